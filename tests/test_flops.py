"""The FLOP formulas against torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import flops
from vtc.engine.host import names
from vtc.kernels.attention_rows import cost


@pytest.mark.parametrize("spec", [None, "random:6", "fastv@2:4"])
def test_llm_prefill(sdpa_llava, spec):
    model, inputs = sdpa_llava.model, sdpa_llava.inputs()
    config = model.config.text_config
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if spec is None:
            model(**inputs, logits_to_keep=1)
            lengths = [24] * 4
        else:
            with vtc.compress(model, spec, positions="original") as handle:
                model(**inputs, logits_to_keep=1)
            lengths = [handle.report.text_tokens[0] + layer[0] for layer in handle.report.per_layer]
    # one query row against 24 keys: the method's own cost, which the counter sees too
    own = cost(1, 4, 2, 1, 24, 8).flops if spec == "fastv@2:4" else 0
    counts = counter.get_flop_counts()
    counted = sum(counts["LlavaForConditionalGeneration.model.language_model"].values())
    counted += sum(counts["LlavaForConditionalGeneration.lm_head"].values())
    assert counted - own == flops.llm_prefill(config, lengths)


def test_vision_tower(sdpa_llava):
    model, inputs = sdpa_llava.model, sdpa_llava.inputs()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.vision_tower(inputs["pixel_values"])
    assert counter.get_total_flops() == flops.vision_tower(model.config.vision_config, 17)


def test_kv_bytes(sdpa_llava):
    model = sdpa_llava.model
    with torch.no_grad():
        cache = names.cache_of(model(**sdpa_llava.inputs(), use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == flops.kv_bytes(model.config.text_config, [24] * 4, element_size=4)
