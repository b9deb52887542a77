"""Every method on every family: it runs as promised and exactly, or it is refused with a reason."""

import functools

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.plan import make_plan
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

RATIO = 0.5
PAIRS = [(family, slug) for family in families() for slug in vtc.methods()]
TOLERANCE = 1e-5


@functools.cache
def built(family):
    return tiny(family)


@pytest.mark.parametrize(("family", "slug"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_method_on_family(family, slug):
    one = built(family)
    adapter = adapter_for(one.model)
    # the decoders here have four layers, and DeepStack models take cuts from layer 3 on
    method = vtc.create(slug, budget=RATIO, **({"layer": 3} if method_has_layer(slug) else {}))
    inputs = one.inputs(PROMPTS)
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


def refusal(adapter, method):
    try:
        make_plan(adapter, (method,), "original", size_bias=False)
    except vtc.VTCError as error:
        return str(error)
    return None


def method_has_layer(slug):
    return vtc.registry.method_class(slug).at == "layer"


def check(one, adapter, method, inputs):
    with vtc.compress(one.model, method, positions="original") as handle, torch.no_grad():
        output = one.model(**inputs, use_cache=True)
        report = handle.report
    cache, length = output.past_key_values, inputs["input_ids"].shape[1]
    visible = visible_columns(cache, length)
    is_visual = inputs["input_ids"] == one.placeholder
    valid = inputs["attention_mask"].bool()
    for layer, lengths in enumerate(report.per_layer):
        assert lengths == tuple((visible(layer) & is_visual).sum(1).tolist()), "the report and the cache disagree"
        assert cache.layers[layer].keys.shape[2] == int((visible(layer) & valid).sum(1).max())
    assert sum(report.after_last_cut) < sum(report.visual_tokens), "nothing was dropped"
    kept = visible(len(adapter.layers) - 1) & valid
    assert bool(torch.isfinite(output.logits[kept]).all())
    if report.token_map.is_selection:
        expected = masked_logits(one.model, inputs, visible)
        assert relative_difference(output.logits[kept], expected[kept]) < TOLERANCE
