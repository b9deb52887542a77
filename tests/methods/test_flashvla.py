"""FlashVLA's score against the code of a sibling method that computes the same one."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
CASES = golden_cases("flashvla", FOLDER, kind="svd_rowcontrib")


def test_all_kinds_are_dispatched():
    assert CASES
    assert golden_cases("flashvla", FOLDER) == CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    x = case["x"][None]
    tokens = vtc.Tokens.of(torch.zeros_like(x), len(case["top16"]), attention_output=x)
    full = vtc.create("flashvla", rank="full")
    torch.testing.assert_close(full.contribution(tokens)[0], case["row_contributions"], atol=1e-4, rtol=1e-5)
    assert torch.equal(full.filter(tokens)[0], case["top16"])
    rank = round(case.number("entropy_effective_rank"))
    cut = case["abs_u_sigma"][:, :rank].sum(1)
    torch.testing.assert_close(vtc.create("flashvla").contribution(tokens)[0], cut, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_both_gram_matrices_give_the_singular_value_decomposition(shape):
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    u, s, _ = torch.linalg.svd(x[0].double(), full_matrices=False)
    tokens = vtc.Tokens.of(x, 5)
    score = vtc.create("flashvla", rank="full", source="hidden").contribution(tokens)[0]
    torch.testing.assert_close(score, (u * s).abs().sum(1).float(), atol=1e-5, rtol=1e-5)
