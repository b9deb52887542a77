"""VisionZip against the authors' code, and against published ports for towers without [CLS]."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.kernels import attention_rows, received_attention
from vtc.primitives import add_mean, canvas_order, pool_units
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
PLAIN = [c for c in golden_cases("visionzip", FOLDER) if c.name.startswith(("b", "edge"))]
QWEN2 = golden_cases("visionzip", FOLDER, kind="nocls_qwen2vl")
QWEN25 = golden_cases("visionzip", FOLDER, kind="nocls_qwen25")
ANYRES = golden_cases("visionzip", FOLDER, kind="anyres_restore")
SIGLIP = golden_cases("visionzip", FOLDER, kind="nocls_siglip")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_golden(case):
    q, k, hidden = case["in_q"], case["in_k"], case["in_hidden"]
    dominant, contextual = case.number("param_dominant"), case.number("param_contextual")
    rows = attention_rows(q[:, :, :1], k, reduce_heads=False)[:, :, 0, 1:]
    torch.testing.assert_close(rows.sum(1), case["out_cls_attention_sum"], atol=1e-5, rtol=1e-5)
    budget = dominant + contextual
    method = vtc.create("visionzip", contextual=contextual / budget, variant="reference")
    tokens = vtc.Tokens.of(hidden, budget, num_prefix=1, cls_attention=rows.mean(1), keys=k)
    token_map = method.stages()[0].decide(tokens)
    assert torch.equal(method.filter(tokens)[:, :dominant], case["out_dominant_idx_unsorted"].sort(1).values)
    torch.testing.assert_close(token_map.apply(hidden), case["out_tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", SIGLIP, ids=str)
def test_dominant_tokens_without_cls(case):
    received = received_attention(case["in_q"], case["in_k"])
    torch.testing.assert_close(received, case["out_received_attention"], atol=1e-6, rtol=1e-4)
    total = case["out_tokens"].shape[1]
    dominant = case["out_dominant_idx_unsorted"].shape[1]
    method = vtc.create("visionzip", contextual=(total - dominant) / total, score="received", variant="reference")
    tokens = vtc.Tokens.of(case["in_hidden"], total, received_attention=received, keys=case["in_k"])
    token_map = method.stages()[0].decide(tokens)
    expected = case["out_dominant_idx_unsorted"].sort(1).values
    assert torch.equal(method.filter(tokens)[:, :dominant], expected)
    # the port merges in bfloat16
    torch.testing.assert_close(token_map.apply(tokens.x), case["out_tokens"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", QWEN2, ids=str)
def test_merged_tokens_of_qwen2(case):
    received = pool_units(received_attention(case["in_q"][None], case["in_k"][None]), 4)
    torch.testing.assert_close(received[0], case["out_received_attention_merged"], atol=1e-6, rtol=1e-4)
    keys = case["in_k"].unflatten(1, (-1, 4)).mean(2)[None]
    total, budget = received.shape[1], case.number("param_budget")
    dominant, contextual = (max(1, int(budget * total * share / 6.4)) for share in (5.4, 1.0))
    kept = dominant + contextual
    method = vtc.create("visionzip", contextual=contextual / kept, score="received")
    tokens = vtc.Tokens.of(case["in_merged_hidden"][None], kept, received_attention=received, keys=keys)
    keep = method.filter(tokens)
    # the port adds members to their target, as the official code, but keeps raster order
    token_map = add_mean(tokens, keep, method.correlate(tokens, keep)).raster()
    assert torch.equal(token_map.anchor[0], case["out_keep_idx"])
    torch.testing.assert_close(token_map.apply(tokens.x)[0], case["out_tokens"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", QWEN25, ids=str)
def test_window_order_of_qwen25(case):
    q, k = case["in_q_window_order"][None], case["in_k_window_order"][None]
    to_image_order = case["in_window_index"].argsort()
    received = pool_units(received_attention(q, k) * q.shape[2], 4)[0, to_image_order]
    torch.testing.assert_close(received, case["out_received_attention_merged"], atol=1e-5, rtol=1e-4)
    keys = pool_units(k[0].mean(0).T, 4).T[to_image_order]
    torch.testing.assert_close(keys, case["out_key_merged"][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ANYRES, ids=str)
def test_crops_in_raster_order(case):
    features, keep = case["in_features"], case["in_keep_idx"]
    crops = (case.number("param_grid_height"), case.number("param_grid_width"))
    patches = keep.sort(1).values[:, 1:] - 1  # without [CLS], the first kept token
    count = patches.shape[1]
    order = canvas_order(patches, crops, side=24)
    kept = features[:, 1 : count + 1].flatten(0, 1)[order]
    expected = torch.cat([kept, features[:, 0], features[:, count + 1 :].flatten(0, 1)])
    assert torch.equal(expected, case["out_tokens"])
