"""Every method on every family: it runs as promised and exactly, or it is refused with a reason.

By default each pair runs on three samples with sdpa; `pytest -m full` runs {eager, sdpa} x {1, 3 samples}.
"""

import dataclasses
import functools
import re

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.engine.planning import make_plan
from vtc.testing import GivenStages, families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

RATIO = 0.5
SAMPLES = {"1": PROMPTS[:1], "3": PROMPTS}
PRODUCT = [
    pytest.param(
        *(family, slug, attention, samples),
        id="-".join((family, slug, attention, samples)),
        marks=() if (attention, samples) == ("sdpa", "3") else pytest.mark.full,
    )
    for family in families()
    for slug in vtc.methods()
    for attention in ("sdpa", "eager")
    for samples in SAMPLES
]
TOLERANCE = 1e-5
#: the decoders here have four layers, and the published lists and settings of these methods are for other depths
OPTIONS = {"shortv": {"layers": (3, 1)}}


@functools.cache
def built(family, attention):
    return tiny(family, attention)


@pytest.mark.parametrize(("family", "slug", "attention", "samples"), PRODUCT)
def test_method_on_family(family, slug, attention, samples):
    one = built(family, attention)
    adapter = adapter_for(one.model)
    # the decoders here have four layers, and DeepStack models take cuts from layer 3 on
    method = vtc.create(slug, budget=RATIO, **OPTIONS.get(slug, {"layer": 3} if method_has_layer(slug) else {}))
    inputs = one.inputs(SAMPLES[samples])
    with torch.no_grad():
        before = one.model(**inputs).logits
    reason = refusal(adapter, method)
    if reason is None:
        check(one, adapter, method, inputs)
    else:
        assert len(reason) > 40, "a refusal says why"
        with pytest.raises(vtc.VTCError):
            vtc.patch(one.model, method, positions="original")
    with torch.no_grad():
        assert torch.equal(one.model(**inputs).logits, before)


#: options that make a method run where its default cannot
ELSEWHERE = {
    "todre:0.5(pivot=farthest, tau=1.1)": "",
    "todre:0.5(stage=2, tau=1.1)": "",
    "sparsity-meets-similarity:0.5(similarity=received)": "",
    "mustdrop-llm@2|3:0.5(key=received, key_layer=0, evict=1)": "",
    "mustdrop-llm@2|3:0.5(key=none, evict=0)": "",
    "lvlm-csp@2|3|3:0.5(clusters=0.25, query=text)": "",
    "lvlm-csp@0|2|3:0.5(selector=cls)": "cls_attention|first 2 layers",
}


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("spec", ELSEWHERE)
def test_options_for_other_families(family, spec):
    one = built(family, "sdpa")
    adapter, (method,) = adapter_for(one.model), vtc.parse(spec)
    reason = refusal(adapter, method)
    if reason is None:
        check(one, adapter, method, one.inputs(PROMPTS))
    else:
        assert ELSEWHERE[spec] and re.search(ELSEWHERE[spec], reason), reason


def refusal(adapter, method):
    try:
        make_plan(adapter, (method,), "original", size_bias=False)
    except vtc.VTCError as error:
        return str(error)
    return None


def method_has_layer(slug):
    return vtc.catalogue.registry.method_class(slug).at == "layer"


def check(one, adapter, method, inputs):
    entering = []  # what the encoder hands to the LLM, before anything is dropped there
    hook = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    # virtual unmerging drops nothing from the cache; tests/engine/test_unmerge.py has its oracle
    with vtc.compress(one.model, method, positions="original", unmerge=False) as handle, torch.no_grad():
        output = one.model(**inputs, use_cache=True)
        report = handle.report
    hook.remove()
    cache, length = names.cache_of(output), inputs["input_ids"].shape[1]
    visible = visible_columns(cache, length)
    is_visual = inputs["input_ids"] == one.placeholder
    valid = inputs["attention_mask"].bool()
    frozen = make_plan(adapter, (method,), "original", size_bias=False).frozen
    for layer, lengths in enumerate(report.kv_tokens):
        visual = (visible(layer) & is_visual).sum(1)
        total = (visible(layer) & valid).sum(1)
        assert lengths == tuple(visual.tolist()), "the report and the cache disagree"
        # a frozen layer holds visual entries and then text, each padded on its own
        widest = visual.max() + (total - visual).max() if layer in frozen else total.max()
        assert cache.layers[layer].keys.shape[2] == int(widest)
    if frozen:
        assert report.flops < report.flops_dense, "nothing was saved"
    else:
        assert sum(report.after_last_cut) < sum(report.visual_tokens), "nothing was dropped"
    if report.kv_tokens != report.per_layer:
        visible = visible_columns(prefilled(one, method, inputs), length)
    for layer, lengths in enumerate(report.per_layer):
        assert lengths == tuple((visible(layer) & is_visual).sum(1).tolist()), "the report and the prefill disagree"

    def unchanged(layer):
        """Frozen tokens, and those that are parked; what was dropped is seen by nobody."""
        return is_visual if layer in frozen else is_visual & ~visible(layer)

    kept = visible(len(adapter.layers) - 1) & valid
    assert bool(torch.isfinite(output.logits[kept]).all())
    encoded = any(stage.site.name in ("tower", "tower_out") for stage in method.stages())
    later = any(stage.site.name not in ("tower", "tower_out") for stage in method.stages())
    # a map is not known after a tower that runs on fewer tokens, but its features are
    if report.token_map.is_selection or not later:
        replace = (is_visual, entering[0][is_visual]) if encoded else None
        expected = masked_logits(one.model, inputs, visible, replace=replace, unchanged=unchanged)
        assert relative_difference(output.logits[kept], expected[kept]) < TOLERANCE


def prefilled(one, method, inputs):
    """The cache as the prompt saw it, without eviction after it."""
    stages = tuple(dataclasses.replace(stage, leave=vtc.Drop()) for stage in method.stages())
    given = GivenStages(given=stages, budget=method.budget)
    with vtc.compress(one.model, given, positions="original"), torch.no_grad():
        return names.cache_of(one.model(**inputs, use_cache=True))
