"""FiCoCo-V's filter and correlate against the authors' code, and its features up to their re-sorting."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.plan import make_plan
from vtc.testing import tiny
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

FOLDER = Path(__file__).parents[1] / "golden"
TOWER = [case for case in golden_cases("ficoco", FOLDER, kind="v_") if "merge_indices" in case]
# recorded with the window state of earlier layers, which this implementation does not have; its first layer is plain
STATEFUL = [case for case in golden_cases("ficoco", FOLDER, kind="v_") if "l0_merge_indices" in case]


def test_all_kinds_are_dispatched():
    assert TOWER
    assert {str(c) for c in TOWER + STATEFUL} == {str(c) for c in golden_cases("ficoco", FOLDER, kind="v_")}


def tower_tokens(q, k, hidden, r):
    side = round((hidden.shape[1] - 1) ** 0.5)
    layout = Layout.grid(side, side).map(lambda part: torch.nn.functional.pad(part, (1, 0), value=-1))
    budget = hidden.shape[1] - 1 - r
    return vtc.Tokens.of(hidden, budget, layout, num_prefix=1, queries=q[None], keys=k[None])


def edges(method, tokens):
    """Which tokens go, and where to with which weight: [r] and [r, K] twice."""
    keep = method.filter(tokens)
    links = method.correlate(tokens, keep)
    count = links.source.shape[1] // (tokens.x.shape[1] - keep.shape[1])
    return keep, *(part[0].view(-1, count) for part in links)


@pytest.mark.parametrize("case", TOWER + STATEFUL, ids=str)
def test_golden_tower(case):
    first = "" if "q" in case else "l0_"
    q, k = case[f"{first}q"], case[f"{first}k"]
    hidden = case["hidden_states" if "hidden_states" in case else "l0_hidden_states"]
    merged = case[f"{first}merge_indices"][0]
    method = vtc.create("ficoco-v", variant="reference")
    tokens = tower_tokens(q, k, hidden, len(merged))
    if not first:
        maxima = method.window_maxima(tokens, method.redundancy(tokens))[0].nonzero()[:, 0]
        assert maxima.tolist() == sorted(case["penalised_tokens"].tolist())
    keep, source, slot, weight = edges(method, tokens)
    assert source[:, 0].tolist() == sorted(merged.tolist())
    target, value = case[f"{first}target_indices"][0], case[f"{first}top_values_of_merged"]
    value = value / value.sum(dim=1, keepdim=True)
    order = merged.argsort()
    for row, (targets, values) in enumerate(zip(target[order].tolist(), value[order], strict=True)):
        for place, token in enumerate(targets):
            stays = (keep[0] == token).nonzero()
            assert slot[row, place] == (int(stays) if len(stays) else -1)
            if len(stays):
                torch.testing.assert_close(weight[row, place], values[place], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", TOWER, ids=str)
def test_golden_tower_terms(case):
    """The two terms before they are mixed, through their mixture at both ends."""
    tokens = tower_tokens(case["q"], case["k"], case["hidden_states"], case.number("r"))
    patch, cls = case["patch_mean_logits"], case["cls_logits"]
    for lam, expected in ((1.0, patch), (0.0, -cls)):
        found = vtc.create("ficoco-v", lam=lam, attention="logits").redundancy(tokens)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", TOWER, ids=str)
def test_golden_tower_features_but_for_the_re_sorting(case):
    """The recorded features are ours when its targets are moved to where its re-sorting put other tokens."""
    hidden, r = case["hidden_states"], case.number("r")
    length = hidden.shape[1]
    merged, remain = case["merge_indices"][0], case["remain_indices"][0]
    value = case["top_values_of_merged"] / case["top_values_of_merged"].sum(dim=1, keepdim=True)
    method = vtc.create("ficoco-v", variant="reference")
    tokens = tower_tokens(case["q"], case["k"], hidden, r)
    place = case["target_indices"][0]
    misplaced = torch.where(place >= length - r, place - r, place)
    as_recorded = vtc.Links(
        merged[:, None].expand_as(place).reshape(1, -1), misplaced.reshape(1, -1), value.reshape(1, -1)
    )
    token_map = method.compress(tokens, remain[None], as_recorded)
    torch.testing.assert_close(token_map.apply(hidden), case["out_hidden"], atol=1e-5, rtol=1e-5)
    # and with the right places the rule is the same, on other tokens
    right = method.stages()[0].decide(tokens)
    assert right.lengths == (length - r,) and right.anchor[0, 0] == 0


def test_compress_keeps_half_of_a_token_that_takes_in_one():
    x = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(0))
    q, k = (torch.randn(2, 17, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    method = vtc.create("ficoco-v", quantile=1.0)
    token_map = method.stages()[0].decide(tower_tokens(q, k, x, 1))
    matrix = token_map.matrix()[0]
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(16))
    assert sorted(matrix.max(dim=1).values.tolist())[0] == 0.5
    assert (matrix.max(dim=1).values < 1).sum() == 1


def test_towers_without_cls_use_the_mean_key():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 16, 4, generator=generator) for _ in range(2))
    tokens = vtc.Tokens.of(torch.randn(1, 16, 4, generator=generator), 4, Layout.grid(4, 4), queries=q, keys=k)
    metric = k[0].mean(dim=0)
    away = -torch.nn.functional.cosine_similarity(metric, metric.mean(dim=0, keepdim=True), dim=1)
    found = vtc.create("ficoco-v", lam=0.0).redundancy(tokens)[0]
    torch.testing.assert_close(found, -away / away.norm(), atol=1e-5, rtol=1e-4)


def test_published_blocks_for_clip_l():
    """Blocks 12..22 of the 23 up to the feature layer."""
    (stage,) = vtc.create("ficoco-v", r=42).stages()
    stages = stage.at_depth(23).repeated(23)
    assert [s.site.index for s in stages] == list(range(12, 23))
    assert stages[-1].schedule(576, 1) == 576 - 11 * 42
    assert make_plan(adapter_for(tiny("llava").model), vtc.parse("ficoco-v(r=4)"), "original", size_bias=False)
