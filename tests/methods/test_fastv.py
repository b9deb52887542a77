"""FastV against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.kernels import attention_rows
from vtc.testing.golden import golden_cases

CASES = golden_cases("fastv", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    start, count = case.number("image_token_start_index"), case.number("image_token_length")
    row = attention_rows(case["q_last"][None, :, None], case["k"][None], scale=0.25)[0, 0]
    torch.testing.assert_close(row, case["attn_last_row"].mean(0), atol=1e-6, rtol=1e-5)
    score = row[start : start + count]
    torch.testing.assert_close(score, case["score"], atol=1e-6, rtol=1e-5)
    (budget,) = vtc.Budget(ratio=1.0 - case.number("fastv_r")).resolve((count,))
    x = case["hidden_states"][:, start : start + count]
    keep = vtc.create("fastv").stages()[0].decide(vtc.Tokens.of(x, budget, query_attention=score[None])).anchor[0]
    length = case["hidden_states"].shape[1]
    whole = torch.cat([torch.arange(start), keep + start, torch.arange(start + count, length)])
    assert torch.equal(whole, case["keep_indexs"])
    assert torch.equal(case["hidden_states"][:, whole], case["out_hidden_states"])
