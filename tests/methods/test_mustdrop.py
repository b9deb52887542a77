"""MustDrop's window merge, key set and dual-attention filter against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.methods.mustdrop import dual_attention
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

FOLDER = Path(__file__).parents[1] / "golden"
POOL = golden_cases("mustdrop", FOLDER, kind="pool_")
FILTER = golden_cases("mustdrop", FOLDER, kind="filter_")


def with_cls(x, budget):
    side = round((x.shape[1] - 1) ** 0.5)
    layout = Layout.grid(side, side, groups=x.shape[0])
    parts = (torch.nn.functional.pad(part, (1, 0), value=-1) for part in (layout.row, layout.col, layout.segment))
    return vtc.Tokens.of(x, budget, Layout(*parts, grids=layout.grids), num_prefix=1)


def test_all_kinds_are_dispatched():
    assert POOL
    assert FILTER
    assert {str(c) for c in POOL + FILTER} == {str(c) for c in golden_cases("mustdrop", FOLDER)}


@pytest.mark.parametrize("case", POOL, ids=str)
def test_golden_windows(case):
    x = case["x"]
    side, other = case["window"].tolist()
    assert side == other
    method = vtc.create("mustdrop", window=side, threshold=case.number("threshold"), variant="reference")
    tokens = with_cls(x, x.shape[1] - 1)
    keep = method.filter(tokens)
    places = torch.cat([torch.zeros(len(x), 1).long(), case["dst_idx"] + 1, case["unm_idx"] + 1], dim=1)
    assert torch.equal(keep[:, : places.shape[1]], places)
    token_map = method.stages()[0].decide(tokens)
    assert token_map.lengths == (places.shape[1],) * len(x)
    torch.testing.assert_close(token_map.apply(x), case["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_map.sizes(), case["size"])
    assert torch.equal(token_map.matrix() > 0, case["source"].bool())


@pytest.mark.parametrize("case", FILTER, ids=str)
def test_golden_filter(case):
    attention = case["attn_text_to_img"].mean(0)[None]
    key = vtc.create("mustdrop").key_tokens(case["cls_attn"][None])
    assert key[0].nonzero()[:, 0].tolist() == sorted(case["key_set"].tolist())
    is_text = torch.ones(1, attention.shape[1], dtype=torch.bool)
    thresholds = {"global_threshold": case.number("global_thr"), "individual_threshold": case.number("individual_thr")}
    important = dual_attention(attention, is_text, torch.zeros_like(key), **thresholds)
    assert torch.equal(important[0].nonzero()[:, 0], case["important"])
    kept = dual_attention(attention, is_text, key, **thresholds)[0]
    assert torch.equal(kept.nonzero()[:, 0], case["kept"])
    assert torch.equal(key[0][kept].nonzero()[:, 0], case["new_key_set"])


def test_similarity_is_the_mean_over_pairs():
    x = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(0))
    tokens = vtc.Tokens.of(x, 12, Layout.grid(6, 6))
    method = vtc.create("mustdrop")
    window, count, _ = method._windows(tokens)
    similarity, is_complete = method._similarity(tokens, window, count)
    for w in range(count):
        unit = torch.nn.functional.normalize(x[0, window[0] == w].double(), dim=-1)
        pairs = (unit @ unit.T)[~torch.eye(9, dtype=torch.bool)]
        assert abs(float(similarity[0, w]) - float(pairs.mean())) < 1e-5
    assert is_complete[0].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("budget", [1, 3, 9, 10, 20, 48])
def test_ceiling_is_kept_without_leaving_the_border(budget):
    x = torch.randn(2, 49, 8, generator=torch.Generator().manual_seed(1))  # 7 x 7: four windows and 13 at the border
    tokens = vtc.Tokens.of(x, budget, Layout.grid(7, 7, groups=2))
    token_map = vtc.create("mustdrop", threshold=2.0).stages()[0].decide(tokens)
    saved = min(4, -(-(49 - budget) // 8)) * 8
    assert token_map.lengths == (min(budget, 49 - saved),) * 2


def test_cls_stays_in_front_and_unmerged():
    x = torch.randn(1, 37, 8, generator=torch.Generator().manual_seed(2))
    token_map = vtc.create("mustdrop").stages()[0].decide(with_cls(x, 12))
    assert token_map.anchor[0, 0] == 0
    assert token_map.lengths == (13,)
    assert torch.equal(token_map.apply(x)[:, 0], x[:, 0])


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(vtc.VTCError, match="layout"):
        vtc.create("mustdrop").filter(vtc.Tokens.of(torch.randn(1, 9, 4), 3))
