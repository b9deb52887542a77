"""ToDRE's first stage against vectors made from the paper's algorithm (no official code exists)."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import vtc
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

CASES = golden_cases("todre", Path(__file__).parents[1] / "golden", kind="specderived")


@pytest.mark.parametrize("case", golden_cases("todre", Path(__file__).parents[1] / "golden"), ids=str)
def test_golden(case):
    assert case.name.startswith("specderived"), "a kind of case that no test reads"
    x, attention = case["in_tokens"][None], case["in_cls_attention"]
    layout = None
    if attention.dim() == 2:  # frames of a video: the pivot is looked for in all of them
        layout = Layout.grid(1, attention.shape[1], segments=attention.shape[0])
    method = vtc.create("todre", thumbnail=attention.dim() == 1)
    tokens = vtc.Tokens.of(x, case.number("param_k"), layout, cls_attention=attention.reshape(1, -1))
    assert torch.equal(method.picks(tokens)[0], case["out_selected_in_pick_order"])
    assert torch.equal(method.stages()[0].decide(tokens).anchor[0], case["out_keep_idx_sorted"])


def test_pivot_comes_from_the_thumbnail():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 6, generator=generator)
    attention = torch.arange(24.0)[None]
    layout = Layout.grid(2, 4, segments=3)
    first = {
        thumbnail: vtc.create("todre", thumbnail=thumbnail)
        .picks(vtc.Tokens.of(x, 4, layout, cls_attention=attention))[0, 0]
        .item()
        for thumbnail in (True, False)
    }
    assert first == {True: 7, False: 23}


@pytest.mark.parametrize("pivot", ["random", "nearest", "farthest"])
def test_pivots_without_cls(pivot):
    x = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0))
    likeness = normalize(x[0], dim=-1) @ normalize(x[0].mean(0), dim=-1)
    expected = {"nearest": likeness.argmax(), "farthest": likeness.argmin()}.get(pivot)
    method = vtc.create("todre", pivot=pivot)
    assert method.stages()[0].signals == ()
    first = method.picks(vtc.Tokens.of(x, 4))[0, 0]
    assert 0 <= first < 30
    assert expected is None or first == expected


def test_k_center_minimises_the_largest_similarity():
    x = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 40, generator=torch.Generator().manual_seed(1))
    tokens = vtc.Tokens.of(x, 9, cls_attention=attention)
    unit = normalize(x[0].double(), dim=-1)
    for objective, reduce in (("k_center", lambda s: s.amax(1)), ("max_sum", lambda s: s.sum(1))):
        picks = [int(attention.argmax())]
        while len(picks) < 9:
            score = reduce(unit @ unit[picks].T)
            score[picks] = torch.inf
            picks.append(int(score.argmin()))
        assert vtc.create("todre", objective=objective).picks(tokens)[0].tolist() == picks
