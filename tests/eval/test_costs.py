"""FLOPs by formula against torch's counter, on every family: vision tower, projector, language model."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import errors, flops
from vtc.adapter import adapter_for
from vtc.eval.bench.costs import observed_encoder
from vtc.testing import families, tiny
from vtc.testing.tiny import PROMPTS, VIDEO_PROMPTS


def counted(model, inputs):
    """What torch counts in a forward with the LM head on one position; the math kernel, because it counts no other."""
    # grouped keys are repeated before the product, which changes no FLOP
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", families())
def test_dense_forward(family):
    built = tiny(family)
    inputs = built.inputs(PROMPTS[:1])
    adapter = adapter_for(built.model)
    with observed_encoder(adapter) as encoder:
        total = counted(built.model, inputs)
    lengths = [inputs["input_ids"].shape[1]] * len(adapter.layers)
    assert encoder.tower > encoder.projector > 0
    assert encoder.tower + encoder.projector + flops.llm_prefill(adapter.text_config, lengths) == total


@pytest.mark.parametrize("family", [name for name in families() if tiny(name).has_video])
def test_videos(family):
    built = tiny(family)
    inputs = built.inputs(VIDEO_PROMPTS[:1])
    adapter = adapter_for(built.model)
    with observed_encoder(adapter) as encoder:
        total = counted(built.model, inputs)
    lengths = [inputs["input_ids"].shape[1]] * len(adapter.layers)
    assert encoder.tower + encoder.projector + flops.llm_prefill(adapter.text_config, lengths) == total


@pytest.mark.parametrize("family", families())
def test_a_prompt_that_is_short_in_every_layer(family):
    """The report's FLOPs are those that the compressed forward spends; `uniform` itself multiplies nothing."""
    built = tiny(family)
    inputs = built.inputs(PROMPTS[:1])
    with vtc.compress(built.model, "uniform:0.5", positions="original") as handle:
        with observed_encoder(adapter_for(built.model)) as encoder:
            total = counted(built.model, inputs)
        report = handle.report
    assert report.flops < report.flops_dense
    assert encoder.tower + encoder.projector + report.flops == total


def test_a_tower_whose_blocks_nobody_names_is_refused(monkeypatch):
    adapter = adapter_for(tiny("llava").model)
    unnamed = tuple(dataclasses.replace(encoder, blocks=()) for encoder in adapter.encoders)
    monkeypatch.setattr(adapter, "encoders", unnamed)
    with pytest.raises(errors.UnsupportedModelError, match="does not name the blocks"), observed_encoder(adapter):
        pass
