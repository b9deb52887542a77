"""EfficientVLA against vectors computed from the paper's equations."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
CASES = golden_cases("efficientvla", FOLDER, kind="specderived")


def test_all_kinds_are_dispatched():
    assert CASES
    assert golden_cases("efficientvla", FOLDER) == CASES


@pytest.mark.parametrize("direction", ["to_text", "to_vision"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equations(case, direction):
    attention = case["attn_vis_to_ctx"].mean(0)[None]
    name = "attention_to_text" if direction == "to_text" else "text_attention"
    signals = {name: attention if direction == "to_text" else attention.transpose(1, 2)}
    is_text = torch.ones(1, attention.shape[2], dtype=torch.bool)
    tokens = vtc.Tokens.of(case["tokens"][None], case.number("k_final"), text_mask=is_text, **signals)
    method = vtc.create("efficientvla", key=case.number("k_key"), alpha=case.number("alpha"), direction=direction)
    relevance = method.relevance(tokens)[0]
    torch.testing.assert_close(relevance, case["relevance_raw"], atol=1e-6, rtol=1e-5)
    assert torch.equal(relevance.topk(case.number("k_key")).indices.sort().values, case["key_idx"])
    is_key = torch.zeros(1, len(relevance), dtype=torch.bool).index_fill(1, case["key_idx"], True)
    expected = case["diversity"]
    seen = ~expected.isnan()
    torch.testing.assert_close(method.diversity(tokens, is_key)[0][seen], expected[seen], atol=1e-5, rtol=1e-5)
    keep = method.stages()[0].decide(tokens).anchor[0]
    assert torch.equal(keep, case["kept_sorted"])
    assert torch.equal(keep, torch.cat([case[f"{part}_idx"] for part in ("key", "task", "div")]).sort().values)


def test_padding_of_the_text_is_not_read():
    generator = torch.Generator().manual_seed(0)
    x, attention = torch.randn(1, 20, 8, generator=generator), torch.rand(1, 5, 20, generator=generator)
    is_text = torch.tensor([[True, True, True, False, False]])
    method = vtc.create("efficientvla")
    full = method.filter(vtc.Tokens.of(x, 9, text_attention=attention, text_mask=is_text))
    short = method.filter(vtc.Tokens.of(x, 9, text_attention=attention[:, :3], text_mask=is_text[:, :3]))
    assert torch.equal(full, short)
