"""CDPruner against the authors' code."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import vtc
from vtc.testing.golden import golden_cases

CASES = golden_cases("cdpruner", Path(__file__).parents[1] / "golden")


def tokens_of(case, groups=slice(None)):
    features = case["in_projected_features"][groups]
    text = case["in_text_embeds"].expand(features.shape[0], -1, -1)
    image = case["in_image_embeds"][groups]
    budget = case.number("param_visual_token_num")
    return vtc.Tokens.of(features, budget, clip_image_embeds=image, clip_text_embeds=text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    method, tokens = vtc.create("cdpruner", variant="reference"), tokens_of(case)
    torch.testing.assert_close(method.quality(tokens), case["out_relevance"], atol=1e-5, rtol=1e-5)
    keep = method.stages()[0].decide(tokens).anchor
    assert torch.equal(keep, case["out_keep_idx"])
    assert torch.equal(torch.zeros_like(case["out_index_mask"]).scatter(1, keep, True), case["out_index_mask"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_scales_every_image_by_itself(case):
    default, reference = vtc.create("cdpruner"), vtc.create("cdpruner", variant="reference")
    together = default.filter(tokens_of(case))
    for b in range(together.shape[0]):
        assert torch.equal(together[b : b + 1], reference.filter(tokens_of(case, slice(b, b + 1))))


def test_relevance_in_the_llm_space():
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 12, 6, generator=generator), torch.randn(2, 4, 6, generator=generator)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    method = vtc.create("cdpruner", relevance="llm")
    quality = method.quality(vtc.Tokens.of(x, 4, text_embeds=text, text_mask=mask))
    for b, count in enumerate((4, 2)):
        cosine = (normalize(x[b], dim=-1) @ normalize(text[b, :count], dim=-1).T).mean(1)
        expected = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
        torch.testing.assert_close(quality[b], expected, atol=1e-5, rtol=1e-5)


def test_theta_sharpens_relevance():
    case = CASES[0]
    plain = vtc.create("cdpruner").quality(tokens_of(case))
    sharp = vtc.create("cdpruner", theta=0.5).quality(tokens_of(case))
    torch.testing.assert_close(sharp, (0.5 * plain).exp())


def test_budget_above_the_rank_stays_finite():
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 3, 4)  # no text at all: equal relevance
    keep = vtc.create("cdpruner").filter(vtc.Tokens.of(x, 10, clip_image_embeds=x, clip_text_embeds=text))
    assert keep[0].unique().numel() == 10
