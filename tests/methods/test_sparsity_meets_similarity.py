"""The cut of Sparsity Meets Similarity by each reading of "inflection point"; there is no published code."""

import numpy as np
import pytest
import torch

import vtc

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
