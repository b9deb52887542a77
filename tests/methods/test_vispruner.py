"""VisPruner against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.kernels import attention_rows
from vtc.primitives import distinct_of
from vtc.testing.golden import golden_cases

CASES = golden_cases("vispruner", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    score = attention_rows(case["in_q"][:, :, :1], case["in_k"])[:, 0, 1:]
    torch.testing.assert_close(score, case["out_cls_score"], atol=1e-5, rtol=1e-5)
    method = vtc.create("vispruner", important=case.number("param_important_ratio"))
    tokens = vtc.Tokens.of(case["in_features"], case.number("param_visual_token_num"), cls_attention=score)
    keep = method.stages()[0].decide(tokens).anchor
    assert torch.equal(keep, case["out_keep_idx"])
    mask = torch.zeros_like(score, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(mask, case["out_index_mask"])


@pytest.mark.parametrize(("length", "budget"), [(144, 30), (64, 10), (64, 4), (9, 1), (9, 8), (5, 3)])
def test_sizes_at_which_the_published_code_fails(length, budget):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 8, generator=generator)
    score = torch.rand(1, length, generator=generator)
    keep = vtc.create("vispruner").filter(vtc.Tokens.of(x, budget, cls_attention=score))
    assert keep.shape == (1, budget)
    assert keep[0].unique().numel() == budget
    assert set(score[0].topk(budget // 2).indices.tolist()) <= set(keep[0].tolist())


def test_rounds_against_a_plain_list():
    x = torch.nn.functional.normalize(torch.randn(23, 6, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    left, want = list(range(23)), 4
    while len(left) > want:
        even, odd = left[::2], left[1::2]
        likeness = {i: max(float(x[i] @ x[j]) for j in odd) for i in even}
        drop = min(8, len(left) - want, len(odd))
        left = sorted(even, key=lambda i: -likeness[i])[drop:] + odd
    found = distinct_of(x.float()[None], torch.arange(23)[None], [23], [want])
    assert found[0].tolist() == left
