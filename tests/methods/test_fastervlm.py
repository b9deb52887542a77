"""FasterVLM against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.kernels import attention_rows
from vtc.testing.golden import golden_cases

CASES = golden_cases("fastervlm", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    q, k, hidden = case["in_q"], case["in_k"], case["in_hidden"]
    score = attention_rows(q[:, :, :1], k)[:, 0, 1:]
    torch.testing.assert_close(score, case["out_cls_score"], atol=1e-5, rtol=1e-5)
    tokens = vtc.Tokens.of(hidden[:, 1:], case.number("param_visual_token_num"), cls_attention=score)
    token_map = vtc.create("fastervlm").stages()[0].decide(tokens)
    assert torch.equal(token_map.anchor, case["out_keep_idx"])
    assert torch.equal(token_map.apply(tokens.x), case["out_features"])
