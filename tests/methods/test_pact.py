"""PACT against the authors' code: clustering alone, and the whole reduction step of a layer."""

from pathlib import Path

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding

import vtc
from vtc.engine.host.masks import causal
from vtc.engine.llm.sizes import added
from vtc.primitives import slot_of
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
CLUSTERS = golden_cases("pact", FOLDER, kind="dbdpc_")
LAYER = golden_cases("pact", FOLDER, kind="layer_")


def labels_of(token_map, order):
    """For the tokens `order` their centre's place in `order`, -1 where they were dropped."""
    slot = token_map.sources()[0]
    center = torch.where(slot < 0, -1, token_map.anchor[0][slot.clamp(min=0)])[order]
    place = torch.full((len(slot),), -1).scatter(0, order, torch.arange(len(order)))
    return torch.where(center < 0, -1, place[center.clamp(min=0)])


def test_all_kinds_are_dispatched():
    assert CLUSTERS
    assert LAYER
    assert {str(c) for c in CLUSTERS + LAYER} == {str(c) for c in golden_cases("pact", FOLDER)}


@pytest.mark.parametrize("case", CLUSTERS, ids=str)
def test_golden_clusters(case):
    kept, pruned = len(case["keys"]), len(case["pruned_keys"])
    keys = torch.cat([case["keys"], case["pruned_keys"]])[None, None]
    x = torch.cat([case["hidden"], case["pruned_hidden"]])[None]
    tokens = vtc.Tokens.of(x, kept + pruned, layer_keys=keys)
    method = vtc.create(
        "pact", cutoff=case.number("cutoff"), retrieve=case.number("coef_pruned"), spread=float(case.number("dc"))
    )
    keep = method.centers(tokens, torch.arange(kept)[None])
    token_map = method.stages()[0].compress(tokens, keep, method.correlate(tokens, keep))
    is_center = case["center_mask"]
    assert torch.equal(token_map.anchor[0], is_center.nonzero()[:, 0])
    assert torch.equal(labels_of(token_map, torch.arange(kept + pruned)), case["labels"])
    torch.testing.assert_close(token_map.apply(x)[0], case["merged"][is_center], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_map.sizes()[0], case["weights"][is_center])


def rotate(x, theta):
    """Rotary embedding of [H, L, d], half-split."""
    frequency = theta ** (-torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None].float() * frequency
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def layer_tokens(case, budget):
    """What the engine has to hand over at the reduction layer."""
    hidden, is_image = case["hidden_in"], case["is_image"]
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + case.number("rms_eps"))
    normed = normed * case["w_input_layernorm.weight"]

    def project(name, heads):
        out = normed @ case[f"w_self_attn.{name}.weight"].T + case[f"w_self_attn.{name}.bias"]
        return out.unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, L, d]

    heads, groups = case.number("num_heads"), case.number("num_kv_heads")
    queries, keys = project("q_proj", heads), project("k_proj", groups)
    rotated = rotate(keys, case.number("rope_theta"))
    end = int(is_image.nonzero().max()) + 1
    query = queries[:, :end].mean(1, keepdim=True)
    logits = query @ keys.repeat_interleave(heads // groups, 0)[:, :end].transpose(1, 2) / keys.shape[-1] ** 0.5
    attention = logits.softmax(-1).mean(0)[0][is_image[:end]]
    torch.testing.assert_close(rotated.transpose(0, 1).flatten(1), case["keys_rope"], atol=1e-5, rtol=1e-5)
    return vtc.Tokens.of(
        hidden[is_image][None], budget, global_attention=attention[None], layer_keys=rotated[None][:, :, is_image]
    )


@pytest.mark.parametrize("case", LAYER, ids=str)
def test_golden_layer(case):
    is_image = case["is_image"]
    tokens = layer_tokens(case, int(is_image.sum()))
    method = vtc.create(
        "pact", keep=case.number("keep_ratio"), cutoff=case.number("cutoff"), retrieve=case.number("coef_pruned")
    )
    torch.testing.assert_close(method.importance(tokens)[0], case["scores"], atol=1e-6, rtol=1e-5)
    first = case["first_mask"]
    assert torch.equal(method.important(tokens)[0], first.nonzero()[:, 0])
    token_map = method.stages()[0].decide(tokens)
    kept = first.nonzero()[:, 0]
    assert torch.equal(token_map.anchor[0], kept[case["center_mask"]])
    assert torch.equal(labels_of(token_map, torch.cat([kept, (~first).nonzero()[:, 0]])), case["labels"])
    merged = token_map.apply(tokens.x)[0]
    torch.testing.assert_close(merged, case["merged_kept"][case["center_mask"]], atol=1e-5, rtol=1e-5)
    sizes = token_map.sizes()[0]
    torch.testing.assert_close(sizes, case["center_weights"][case["center_mask"]])
    start, end = int(is_image.nonzero().min()), int(is_image.nonzero().max()) + 1
    hidden = case["hidden_in"]
    torch.testing.assert_close(
        torch.cat([hidden[:start], merged, hidden[end:]]), case["hidden_reduced"], atol=1e-5, rtol=1e-5
    )
    position = torch.cat([torch.arange(start), token_map.anchor[0] + start, torch.arange(end, len(hidden))])
    assert torch.equal(position, case["pos_reduced"])
    # the published code takes the logarithm in float16
    bias = torch.zeros(len(position)).index_copy(0, torch.arange(len(sizes)) + start, sizes.log())
    torch.testing.assert_close(bias, case["log_weights"], atol=6e-4, rtol=0)


@pytest.mark.parametrize("case", LAYER, ids=str)
def test_golden_layer_output_with_log_sizes(case):
    """A stock decoder layer with the recorded weights, under the mask that the engine hands to it."""
    hidden, heads = case["hidden_reduced"][None], case.number("num_heads")
    config = Qwen2Config(
        hidden_size=hidden.shape[2],
        intermediate_size=case["w_mlp.gate_proj.weight"].shape[0],
        num_attention_heads=heads,
        num_key_value_heads=case.number("num_kv_heads"),
        rms_norm_eps=case.number("rms_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": float(case.number("rope_theta"))},
    )
    bias = case["log_weights"][None]
    valid = torch.ones_like(bias, dtype=torch.bool)
    for attention in ("eager", "sdpa"):
        config._attn_implementation = attention
        layer = Qwen2DecoderLayer(config, 0).eval()
        layer.load_state_dict({key[2:]: case[key] for key in case.arrays if key.startswith("w_")})
        mask = added(causal(valid, hidden.shape[1], hidden.dtype, attention), bias, hidden.dtype)
        rotation = Qwen2RotaryEmbedding(config)(hidden, case["pos_reduced"][None])
        with torch.no_grad():
            out = layer(hidden, attention_mask=mask, position_embeddings=rotation)
        torch.testing.assert_close(out[0], case["layer_out"], atol=1e-5, rtol=1e-5)


def test_ceiling_keeps_the_first_centres():
    case = next(c for c in CLUSTERS if len(c["pruned_keys"]))
    x, keys = case["hidden"][None], case["keys"][None, None]
    method = vtc.create("pact", keep=1.0, cutoff=case.number("cutoff"))
    signals = {"layer_keys": keys, "global_attention": torch.ones(1, x.shape[1])}
    free = method.stages()[0].decide(vtc.Tokens.of(x, x.shape[1], **signals))
    few = method.stages()[0].decide(vtc.Tokens.of(x, 3, **signals))
    assert few.lengths == (3,)
    assert free.lengths[0] > 3
    assert (slot_of(free.anchor, x.shape[1])[0][few.anchor[0]] >= 0).all()
