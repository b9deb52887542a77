"""STAR's two scores by their definitions (there is no published code), and its split of the budget."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.testing import tiny
from vtc.testing.tiny import PROMPTS

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(1, 20, 12, generator=GENERATOR)
TEXT = torch.randn(1, 6, 12, generator=GENERATOR)


def best(score, count):
    return score.topk(count).indices.sort().values


def test_stage_1_is_the_column_mean():
    attention = (X[0].double() @ X[0].double().T / 12**0.5).softmax(dim=1)
    assert torch.allclose(attention.mean(dim=1), torch.tensor(1 / 20).double())  # as printed: nothing to rank
    keep = vtc.create("star").stages()[0].decide(vtc.Tokens.of(X, 7)).anchor[0]
    assert torch.equal(keep, best(attention.mean(dim=0), 7))


@pytest.mark.parametrize("relevance", ["softmax", "logits"])
def test_stage_2_counts_the_text_behind_the_image(relevance):
    is_text = torch.tensor([[True] * 5 + [False]])
    after = torch.tensor([[False, False, True, True, True, True]])
    tokens = vtc.Tokens.of(X, 7, normed_states=X, text_states=TEXT, text_mask=is_text, text_after=after)
    logits = X[0].double() @ TEXT[0, 2:5].double().T / 12**0.5
    score = logits.softmax(dim=0).mean(dim=1) if relevance == "softmax" else logits.mean(dim=1)
    keep = vtc.create("star", relevance=relevance).stages()[1].decide(tokens).anchor[0]
    assert torch.equal(keep, best(score, 7))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("star:4", [10, 10, 4, 4]), ("star@3:4(share=0.75)", [7, 7, 7, 4]), ("star@0.25:15", [16, 15, 15, 15])],
)
def test_both_stages_share_the_budget(spec, expected):
    llava = tiny("llava")
    with vtc.compress(llava.model, spec) as handle, torch.no_grad():
        llava.model(**llava.inputs(PROMPTS))
        assert handle.report.per_layer == tuple((n, 2 * n, 0) for n in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "share=1.0"),
        ({"relevance": "rows"}, "relevance='rows'"),
        ({"layer": 2.5}, "layer=2.5 of method 'star'"),
        ({"layer": 0}, "layer=0 of method 'star'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("star", **options)
