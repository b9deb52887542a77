"""The cut of Sparsity Meets Similarity by each reading of "inflection point"; there is no published code."""

import numpy as np
import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

SLUG = "sparsity-meets-similarity"


def tokens_of(score, budget=None):
    score = torch.as_tensor(score).float()[None]
    return vtc.Tokens.of(torch.zeros(1, score.shape[1], 2), budget or score.shape[1], cls_attention=score)


def long_tail(n, seed=0):
    return np.random.default_rng(seed).pareto(2.0, n).astype(np.float32)


def by_chord(curve):
    x, y = np.linspace(0, 1, len(curve)), (curve - curve[-1]) / (curve[0] - curve[-1])
    return int(np.abs(x + y - 1).argmax()) + 1


def by_second_difference(curve):
    return int(np.diff(curve, 2).argmax()) + 2


def by_outliers(curve):
    neighbors = pytest.importorskip("sklearn.neighbors")
    return int((neighbors.LocalOutlierFactor(n_neighbors=10).fit_predict(curve[:, None]) == -1).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("inflection", "expected"), [("kneedle", by_chord), ("maxdiff2", by_second_difference), ("lof", by_outliers)]
)
def test_cut(inflection, expected, seed):
    score = long_tail(97, seed)
    tokens = tokens_of(score)
    token_map = vtc.create(SLUG, inflection=inflection).stages()[0].decide(tokens)
    count = max(1, expected(np.sort(score.astype(np.float64))[::-1].copy()))
    assert token_map.lengths == (count,)
    assert token_map.anchor[0].tolist() == sorted(np.argsort(-score, kind="stable")[:count].tolist())


def test_an_elbow_is_found():
    score = [0.9, 0.8, 0.7, 0.05, 0.04, 0.03, 0.02, 0.01]
    assert vtc.create(SLUG).stages()[0].decide(tokens_of(score)).lengths == (4,)


def test_floor_and_ceiling():
    score = long_tail(60)
    assert vtc.create(SLUG, least=30).stages()[0].decide(tokens_of(score)).lengths[0] >= 30
    assert vtc.create(SLUG, least=30).stages()[0].decide(tokens_of(score, 5)).lengths == (5,)


@pytest.mark.parametrize("inflection", ["kneedle", "maxdiff2", "lof"])
@pytest.mark.parametrize("score", [[0.5], [0.5, 0.5], [0.1, 0.3, 0.2], [0.25] * 40])
def test_short_and_flat_curves(inflection, score):
    (count,) = vtc.create(SLUG, inflection=inflection).stages()[0].decide(tokens_of(score)).lengths
    assert 1 <= count <= len(score)


def test_cosine_reads_the_hidden_cls():
    x = torch.randn(1, 21, 8, generator=torch.Generator().manual_seed(0))
    tokens = vtc.Tokens.of(x, 6, num_prefix=1)
    token_map = vtc.create(SLUG, similarity="cosine", least=6).stages()[0].decide(tokens)
    cosine = torch.nn.functional.cosine_similarity(x[0, 1:], x[0, :1], dim=-1)
    assert token_map.anchor[0].tolist() == (cosine.topk(6).indices + 1).sort().values.tolist()


def with_text(x, text, budget=None, after=None):
    is_text = torch.arange(text.shape[1])[None] < text.shape[1] - 1  # the last row is padding
    behind = torch.ones_like(is_text) if after is None else torch.tensor([after])
    return vtc.Tokens.of(x, budget or x.shape[1], text_embeds=text, text_mask=is_text, text_after=behind)


def second_stage(**options):
    (stage,) = vtc.create(SLUG, stage="2", **options).stages()
    assert str(stage.site) == "llm_in"
    return stage


@pytest.mark.parametrize("relevance", ["max", "mean"])
def test_stage_2_ranks_by_cosine_to_the_text(relevance):
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 40, 6, generator=generator), torch.randn(1, 5, 6, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(x[0, :, None], text[0, :4], dim=-1)
    score = cosine.amax(1) if relevance == "max" else cosine.mean(1)
    for ratio in (0.25, 0.5, 1.0):
        token_map = second_stage(relevance=relevance, second_ratio=ratio).decide(with_text(x, text))
        assert token_map.lengths == (int(40 * ratio),)
        assert torch.equal(token_map.anchor[0], score.topk(int(40 * ratio)).indices.sort().values)
    count = by_chord(score.sort(descending=True).values.double().numpy())
    assert second_stage(relevance=relevance).decide(with_text(x, text)).lengths == (count,)
    assert second_stage(relevance=relevance).decide(with_text(x, text, 2)).lengths == (2,)
    behind = [False, True, True, True, True]
    score = cosine[:, 1:].amax(1) if relevance == "max" else cosine[:, 1:].mean(1)
    kept = second_stage(relevance=relevance, second_ratio=0.25).decide(with_text(x, text, after=behind))
    assert torch.equal(kept.anchor[0], score.topk(10).indices.sort().values)


def test_stage_2_without_text_keeps_all():
    x, text = torch.randn(1, 7, 4), torch.zeros(1, 1, 4)
    assert second_stage().decide(with_text(x, text)).lengths == (7,)


def test_both_stages_in_a_model_equal_the_masked_model(llava):
    inputs = llava.inputs(PROMPTS)
    counts = {}
    for stage in ("1", "2", "both"):
        with vtc.compress(llava.model, f"{SLUG}:14(stage={stage})", positions="original") as handle, torch.no_grad():
            out = llava.model(**inputs, use_cache=True)
            report = handle.report
        visible = visible_columns(names.cache_of(out), inputs["input_ids"].shape[1])
        expected = masked_logits(llava.model, inputs, visible)
        kept = visible(0) & inputs["attention_mask"].bool()
        assert relative_difference(out.logits[kept], expected[kept]) < 1e-5
        assert len(set(report.per_layer)) == 1
        counts[stage] = report.entering
    assert counts["both"][:2] < counts["1"][:2] < (14, 28)
    assert counts["2"] != counts["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "3"}, "stage='3'"),
        ({"relevance": "sum"}, "relevance='sum'"),
        ({"second_ratio": 1.5}, "second_ratio=1.5"),
        ({"least": 0}, "least=0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create(SLUG, **options)


def test_towers_without_cls_have_an_option():
    model = tiny("paligemma").model
    with pytest.raises(errors.SignalUnavailableError, match=r"no \[CLS\]"):
        vtc.patch(model, f"{SLUG}:8")
    vtc.patch(model, f"{SLUG}:8(similarity=received)").remove()
