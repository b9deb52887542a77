"""FiCoCo-V against the authors' code: what goes, where to, with which weight, and the features of every block."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.planning import make_plan
from vtc.methods.ficoco_v import DIFFERENCES, FiCoCoV
from vtc.testing import tiny
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout

FOLDER = Path(__file__).parents[1] / "golden"
TOWER = [case for case in golden_cases("ficoco", FOLDER, kind="v_") if "merge_indices" in case]
# blocks that hand on the cells of the grid in which a maximum was found
STATEFUL = [case for case in golden_cases("ficoco", FOLDER, kind="v_") if "l0_merge_indices" in case]


def test_all_kinds_are_dispatched():
    assert TOWER
    assert {str(c) for c in TOWER + STATEFUL} == {str(c) for c in golden_cases("ficoco", FOLDER, kind="v_")}


def tower_tokens(q, k, hidden, r):
    side = round((hidden.shape[1] - 1) ** 0.5)
    layout = Layout.grid(side, side).map(lambda part: torch.nn.functional.pad(part, (1, 0), value=-1))
    budget = hidden.shape[1] - 1 - r
    return vtc.Tokens.of(hidden, budget, layout, num_prefix=1, queries=q[None], keys=k[None])


def check_block(method, tokens, recorded):
    """One block of the recorded arrays; the features that go on to the next one."""
    keep = method.filter(tokens)
    assert torch.equal(keep, recorded["remain_indices"])
    merged = recorded["merge_indices"][0]
    links = method.correlate(tokens, keep)
    source, slot, weight = (part[0].view(len(merged), -1) for part in links)
    order = merged.argsort()
    assert torch.equal(source[:, 0], merged[order])
    # a target is a place among the tokens before they are sorted, moved by r where it lies behind the new end
    place, r = recorded["target_indices"][0][order], len(merged)
    assert torch.equal(slot, torch.where(place >= tokens.x.shape[1] - r, place - r, place))
    value = recorded["top_values_of_merged"][order]
    torch.testing.assert_close(weight, value / value.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    token_map = method.compress(tokens, keep, links)
    assert token_map.anchor[0].tolist() == sorted(keep[0].tolist())
    features = token_map.apply(tokens.x)
    torch.testing.assert_close(features, recorded["out_hidden"], atol=1e-5, rtol=1e-5)
    return features, token_map


@pytest.mark.parametrize("case", TOWER, ids=str)
def test_golden_tower(case):
    method = vtc.create("ficoco-v", variant="reference")
    tokens = tower_tokens(case["q"], case["k"], case["hidden_states"], case.number("r"))
    penalised = sorted(case["penalised_tokens"].tolist())
    redundancy = method.redundancy(tokens)
    is_first, taken = method.free_maxima(tokens, redundancy)
    assert is_first[0].nonzero()[:, 0].tolist() == taken[0].nonzero()[:, 0].tolist() == penalised
    assert method.window_maxima(tokens, redundancy)[0].nonzero()[:, 0].tolist() == penalised  # the same in a full grid
    check_block(method, tokens, case)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_golden_blocks_hand_on_their_windows(case):
    method = vtc.create("ficoco-v", variant="reference")
    (stage,) = method.stages()
    hidden, layout, carried = case["hidden_states"], None, {}
    blocks = sum(key.endswith("_merge_indices") for key in case.arrays)
    assert blocks > 1
    for block in range(blocks):
        names = ("q", "k", "merge_indices", "remain_indices", "target_indices", "top_values_of_merged", "out_hidden")
        recorded = {name: case[f"l{block}_{name}"] for name in names}
        plain = tower_tokens(recorded["q"], recorded["k"], hidden, case.number("r"))
        layout = plain.layout if layout is None else layout
        tokens = replace(plain, layout=layout, signals={**plain.signals, **carried})
        hidden, token_map = check_block(method, tokens, recorded)
        layout = layout.take(token_map.anchor)
        carried = {"carried": stage.carry(tokens)}
        assert int(carried["carried"].sum()) == case.number(f"l{block}_n_inf_state_after")


def test_every_difference_is_an_option_of_its_own():
    """Each one alone changes the decision, and the reference options together are the reference."""
    case = TOWER[0]
    tokens = tower_tokens(case["q"], case["k"], case["hidden_states"], case.number("r"))
    carried = torch.zeros(1, 576, dtype=torch.bool).index_fill(1, torch.arange(0, 576, 5), True)
    tokens = replace(tokens, signals={**tokens.signals, "carried": carried})

    def features(**options):
        return vtc.create("ficoco-v", **options).stages()[0].decide(tokens).apply(tokens.x)

    paper, reference = features(), features(variant="reference")
    for name, (first, second) in DIFFERENCES.items():
        assert torch.equal(features(**{name: first}), paper)
        assert not torch.equal(features(**{name: second}), paper)
        assert not torch.equal(features(variant="reference", **{name: first}), reference)
    assert torch.equal(features(**{name: second for name, (_, second) in DIFFERENCES.items()}), reference)
    with pytest.raises(vtc.VTCError, match="order"):
        vtc.create("ficoco-v", order="random")


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
def test_the_engine_hands_on_what_a_block_took(prompts):
    """Through a whole tower, against the blocks one after the other on what the engine gave the method."""
    one = tiny("llava")
    seen = []

    @dataclass(frozen=True)
    class Noting(FiCoCoV):
        def free_maxima(self, tokens, redundancy):
            found = super().free_maxima(tokens, redundancy)
            seen.append((tokens.signals.get("carried"), found[1]))
            return found

    method = Noting(first=0, r=3, variant="reference", budget=vtc.Budget(tokens=4))
    with vtc.compress(one.model, method), torch.no_grad():
        one.model(**one.inputs(prompts))
    assert len(seen) > 2
    blocks = [seen[i] for i in range(0, len(seen), 2)]  # once to spread, once to hand on
    assert blocks[0][0] is None
    for (_, before), (carried, after) in pairwise(blocks):
        assert torch.equal(carried, before)
        assert bool((after | ~before).all())
        assert bool((after.sum(1) > before.sum(1)).all())
    with vtc.compress(one.model, method), torch.no_grad():
        seen.clear()
        one.model(**one.inputs(prompts))
    assert seen[0][0] is None  # nothing is left of earlier images


@pytest.mark.parametrize("case", TOWER, ids=str)
def test_golden_tower_terms(case):
    """The two terms before they are mixed, through their mixture at both ends."""
    tokens = tower_tokens(case["q"], case["k"], case["hidden_states"], case.number("r"))
    patch, cls = case["patch_mean_logits"], case["cls_logits"]
    for lam, expected in ((1.0, patch), (0.0, -cls)):
        found = vtc.create("ficoco-v", lam=lam, attention="logits").redundancy(tokens)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


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
