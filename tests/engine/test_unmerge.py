"""Virtual unmerging: the LLM equals one on the full sequence of merged tokens whose states are averaged per token."""

import functools
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import errors, flops
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.testing import masked_logits, relative_difference, tiny
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS

TOLERANCE = 1e-5
BATCHES = {"one": PROMPTS[:1], "three": PROMPTS}


@functools.cache
def built(family, attention):
    return tiny(family, attention)


def expected_logits(one, inputs, token_map, plain):
    """The stock model on the full sequence; after every attention the outputs of equal tokens are averaged."""
    is_visual = inputs["input_ids"] == one.placeholder
    lengths = [len(part) for part in plain]
    merged = token_map.apply(torch.nn.utils.rnn.pad_sequence(plain, batch_first=True))
    slots = [row[:n] for row, n in zip(token_map.sources(), lengths, strict=True)]
    features = torch.cat([part[slot] for part, slot in zip(merged, slots, strict=True)])
    group = torch.arange(is_visual.numel())
    for place, slot in zip(is_visual.flatten().nonzero()[:, 0].split(lengths), slots, strict=True):
        for s in slot.unique():
            group[place[slot == s]] = place[slot == s][0]

    def average(module, args, output):
        flat = output[0].flatten(0, 1)
        total = torch.zeros_like(flat).index_add(0, group, flat)
        count = torch.zeros(len(flat)).index_add(0, group, torch.ones(len(flat)))
        return (total / count.clamp(min=1)[:, None])[group].reshape(output[0].shape), *output[1:]

    adapter = adapter_for(one.model)
    hooks = [adapter.projections(i)[0].register_forward_hook(average) for i in range(len(adapter.layers))]
    everything = torch.ones_like(is_visual)
    try:
        return masked_logits(one.model, inputs, lambda layer: everything, replace=(is_visual, features))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_prefill_and_decoding(family, prompts, attention):
    one = built(family, attention)
    inputs = one.inputs(prompts)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        output = one.model.base_model.get_image_features(**pixels).pooler_output
        plain = [part.reshape(-1, part.shape[-1]) for part in output]
    with vtc.compress(one.model, "pool:5", unmerge=True) as handle, torch.no_grad():
        out = one.model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            suppress_tokens=[196, 197, 198, 199],
            return_dict_in_generate=True,
            output_logits=True,
        )
        report = handle.report
    full = one.extend(inputs, out.sequences[:, length:-1])
    expected = expected_logits(one, full, report.token_map, plain)
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    assert report.kv_bytes == report.kv_bytes_dense
    assert report.flops < report.flops_dense
    assert names.cache_of(out).get_seq_length() == full["input_ids"].shape[1]


def test_flops_are_what_the_counter_counts(sdpa_llava):
    inputs = sdpa_llava.inputs(PROMPTS[:1])
    model = sdpa_llava.model
    # the products themselves: which fused attention is counted differs between versions of torch
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as tower:
        model.model.get_image_features(inputs["pixel_values"])
    with vtc.compress(model, "pool:5", unmerge=True) as handle, torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        report = handle.report
    own = counter.get_total_flops() - tower.get_total_flops() - report.flops
    # the decision itself (a merge by a dense product, say) is not the LLM's
    assert 0 <= own < 0.02 * report.flops
    length = inputs["input_ids"].shape[1]
    n = report.per_layer[0][0] + report.text_tokens[0]
    assert report.flops == flops.llm_prefill(model.config.text_config, [n] * 4, attending=[length] * 4)


@pytest.mark.parametrize("case", golden_cases("dymu", Path(__file__).parents[1] / "golden", kind="vtu"), ids=str)
def test_golden_attention(case):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    from vtc.engine.llm.unmerge import Unmerging

    mapping = case["mapping"].long()[None]
    rows = case["x_un"].shape[1]
    column = torch.stack([(mapping[0] == r).nonzero()[0, 0] for r in range(rows)])[None]
    unmerging = Unmerging(column, mapping)
    width, heads = case["x_un"].shape[2], int(case.number("num_heads"))
    config = LlamaConfig(hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads)
    config._attn_implementation = "eager"
    attention = LlamaAttention(config, 0).eval()
    attention.load_state_dict({f"{p}_proj.weight": case[f"{p}_w"] for p in "qkvo"})
    length = mapping.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        full, _ = attention(unmerging.expand(case["x_un"]), (case["cos"], case["sin"]), mask)
    torch.testing.assert_close(unmerging.mean(full), case["out_default"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unmerging.mean(full), case["out_exact"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmerging.mean(case["remerge_in"]), case["remerge_out"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("pool:5 + fastv@2:3", {}, "layer"),
        ("pool:5", {"positions": "compact"}, "positions='compact'"),
        ("pool:5", {"size_bias": True}, "size_bias"),
    ],
)
def test_what_does_not_go_together_is_refused(sdpa_llava, spec, options, message):
    with pytest.raises(errors.UnsupportedFeatureError, match=message):
        vtc.patch(sdpa_llava.model, spec, unmerge=True, **options)


def test_deepstack_is_refused():
    with pytest.raises(errors.UnsupportedFeatureError, match="DeepStack"):
        vtc.patch(built("qwen3_vl", "sdpa").model, "pool:5", unmerge=True)


def test_a_method_that_drops_is_refused_while_running(sdpa_llava):
    with (
        vtc.compress(sdpa_llava.model, "random:5", unmerge=True),
        pytest.raises(errors.UnsupportedFeatureError, match="dropped some"),
    ):
        sdpa_llava.model(**sdpa_llava.inputs(PROMPTS))
