"""Phases of one generation, the ideal, and architectures with random weights."""

import contextlib

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.eval.bench import architectures
from vtc.eval.bench.ideal import ideal
from vtc.eval.bench.latency import PHASES, Variant, measure
from vtc.testing import families, tiny

#: stock classes whose `generate` takes no embeddings
NO_EMBEDDINGS = ("gemma3", "paligemma")


def variants(built, spec):
    inputs = built.inputs([(3, "image", 5)])

    def generate(**options):
        return built.model.generate(**inputs, **options)

    found = {"dense": Variant(generate, contextlib.nullcontext)}
    if spec:
        found["method"] = Variant(generate, lambda: vtc.compress(built.model, spec, positions="original"))
    return inputs, found


@pytest.mark.parametrize("family", families())
def test_every_phase_of_every_family(family):
    built = tiny(family)
    adapter = adapter_for(built.model)
    _, calls = variants(built, "uniform:4")
    calls["dense"].generate(max_new_tokens=1)  # transformers hooks its own towers on the first call
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in built.model.modules())
    found = measure(adapter, calls, runs=2, warmup=1, new_tokens=3)
    for name, phases in found.items():
        present = set(PHASES) - ({"selection_ms"} if name == "dense" else set())
        assert set(phases.samples) == present
        medians = {phase: timing.median for phase, timing in phases.summaries().items()}
        assert all(value > 0 for value in medians.values()), medians
        parts = sum(medians[p] for p in ("encoder_ms", "projector_ms", "prefill_ms"))
        assert parts < medians["ttft_ms"] + medians.get("selection_ms", 0.0)
        assert all(len(samples) == 2 for samples in phases.samples.values())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in built.model.modules()) == before


def test_selection_inside_layers_is_no_part_of_the_prefill(sdpa_llava, monkeypatch):
    """A decision that takes 50 ms longer in a layer shows in selection_ms, not in prefill_ms."""
    import time

    from vtc.methods.fastv import FastV

    stages = FastV.stages

    def slow(self):
        import dataclasses

        def wait(filter_):
            def chosen(tokens):
                time.sleep(0.05)
                return filter_(tokens)

            return chosen

        return tuple(dataclasses.replace(stage, filter=wait(stage.filter)) for stage in stages(self))

    monkeypatch.setattr(FastV, "stages", slow)
    _, calls = variants(sdpa_llava, "fastv@2:4")
    found = measure(adapter_for(sdpa_llava.model), calls, runs=1, new_tokens=1)["method"].summaries()
    assert found["selection_ms"].median >= 50
    assert found["ttft_ms"].median >= 50 + found["prefill_ms"].median


@pytest.mark.parametrize("family", [name for name in families() if name not in NO_EMBEDDINGS])
def test_the_ideal_feeds_only_so_many_tokens(family):
    built = tiny(family)
    adapter = adapter_for(built.model)
    inputs, _ = variants(built, None)
    seen = []
    watch = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    calls = []
    encoder = adapter.encoders[0]
    tower = encoder.tower.register_forward_hook(lambda *args: calls.append(1))
    before = int((inputs["input_ids"] == encoder.placeholder_id).sum())
    variant = ideal(adapter, inputs, 5)
    seen.clear()
    calls.clear()
    with torch.inference_mode():
        variant.generate(max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [inputs["input_ids"].shape[1] - before + 5, 1]
    assert len(calls) == 1
    watch.remove()
    tower.remove()


@pytest.mark.parametrize("family", NO_EMBEDDINGS)
def test_the_ideal_says_where_it_cannot_be_had(family):
    built = tiny(family)
    inputs, _ = variants(built, None)
    with pytest.raises(vtc.VTCError, match="takes no inputs_embeds"):
        ideal(adapter_for(built.model), inputs, 5)


def test_the_ideal_is_defined_for_equal_prompts(sdpa_llava):
    inputs = sdpa_llava.inputs([(3, "image", 5), ("image", 2)])
    with pytest.raises(vtc.VTCError, match="equal prompts"):
        ideal(adapter_for(sdpa_llava.model), inputs, 5)


#: billions of parameters, as the publishers count them
PUBLISHED = {
    "gemma-3-4b": 4.30,
    "internvl3-8b": 7.94,
    "llava-1.5-13b": 13.35,
    "llava-1.5-7b": 7.06,
    "llava-next-7b": 7.06,
    "llava-onevision-7b": 8.03,
    "qwen2-vl-7b": 8.29,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-8b": 8.77,
}


@pytest.mark.parametrize("name", architectures.archs())
def test_architectures_are_as_large_as_published(name):
    from transformers import AutoModelForImageTextToText

    arch = architectures._ARCHS[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(arch.config(arch.tower, arch.decoder))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.01)


@pytest.mark.parametrize(("name", "tokens"), [("llava-1.5-7b", 576), ("llava-next-7b", 2928), ("qwen3-vl-8b", 1024)])
def test_small_twins_answer_prompts_with_as_many_tokens(name, tokens):
    built = architectures.build(name, "cpu")
    assert built.is_small
    inputs = built.inputs(1)
    with vtc.compress(built.model, "uniform:64", positions="original") as handle, torch.inference_mode():
        built.model.generate(**inputs, max_new_tokens=1)
    assert handle.report.visual_tokens == (tokens,)
    assert handle.report.entering == (64,)


def test_unknown_architectures_are_refused():
    with pytest.raises(vtc.VTCError, match=r"llava-1\.5-7b"):
        architectures.build("llava-1.5-8b", "cpu")
