"""VTC-CLS against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.errors import SpecError
from vtc.testing.golden import golden_cases

CASES = golden_cases("vtc-cls", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    # the vectors hold every layer of the tower, the signal ends at the feature layer, the last but one
    rows = case["in_cls_attn"].mean(1)[None, :-1, 1:]
    features = case["in_hidden"][:, 1:]
    method = vtc.create("vtc-cls", start_layer=case.number("param_start_layer"))
    tokens = vtc.Tokens.of(features, case.number("param_token_num"), cls_attention_layers=rows)
    torch.testing.assert_close(method.score(tokens)[0], case["out_score"], atol=1e-5, rtol=1e-5)
    token_map = method.stages()[0].decide(tokens)
    assert torch.equal(token_map.anchor[0], case["out_keep_idx"])
    torch.testing.assert_close(token_map.apply(features), case["out_features"], atol=1e-5, rtol=1e-5)


def test_negative_start_counts_from_the_layer_behind_the_features():
    rows = torch.rand(1, 5, 20, generator=torch.Generator().manual_seed(0))  # a tower of 6 layers
    tokens = vtc.Tokens.of(torch.zeros(1, 20, 4), 4, cls_attention_layers=rows)
    for start, first in ((-2, 4), (-4, 2), (3, 3), (0, 0), (-99, 0)):
        score = vtc.create("vtc-cls", start_layer=start).score(tokens)
        torch.testing.assert_close(score, rows[:, first:].sum(1))


def test_empty_ranges_are_refused():
    tokens = vtc.Tokens.of(torch.zeros(1, 8, 4), 4, cls_attention_layers=torch.ones(1, 5, 8))
    with pytest.raises(SpecError, match="5 layers"):
        vtc.create("vtc-cls", start_layer=5).filter(tokens)
    with pytest.raises(SpecError, match="leaves no layer"):
        vtc.create("vtc-cls", start_layer=-1)
