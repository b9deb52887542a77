"""Patch, remove, nest, fail: the model is always either patched or exactly what it was before."""

import gc
import inspect
import weakref

import pytest
import torch

import vtc
from vtc.engine.host import names
from vtc.engine.llm.forward import FORWARD
from vtc.engine.patch import active_on
from vtc.engine.vision import signals as tower_signals
from vtc.engine.vision.call import ENCODE
from vtc.testing.tiny import families, tiny


def fingerprint(model):
    """Everything of a model that a patch could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    state = [repr(model.config.to_dict()), inspect.signature(model.forward), model.forward.__name__]
    for name, module in model.named_modules():
        state.append((name, type(module), tuple(sorted(vars(module))), tuple(len(getattr(module, h)) for h in hooks)))
    return state


@pytest.mark.parametrize("spec", ["random:6", "fastervlm:7 + fastv@2:4", "visionzip:6", "dart@1:9"])
def test_remove_restores_everything(llava, spec):
    inputs = llava.inputs()
    with torch.no_grad():
        llava.model(**inputs, output_hidden_states=True)  # transformers installs its own capture hooks once
        before, logits = fingerprint(llava.model), llava.model(**inputs).logits
        handle = vtc.patch(llava.model, spec)
        assert handle.active
        assert fingerprint(llava.model) != before
        llava.model.generate(**inputs, max_new_tokens=2)
        handle.remove()
        handle.remove()
        assert not handle.active
        assert fingerprint(llava.model) == before
        assert torch.equal(llava.model(**inputs).logits, logits)


def test_patching_twice_is_an_error_that_says_so(sdpa_llava):
    handle = vtc.patch(sdpa_llava.model, "random:6")
    with pytest.raises(vtc.errors.StateError, match=r"already patched with 'random:6'"):
        vtc.patch(sdpa_llava.model, "uniform:6")
    handle.remove()
    vtc.patch(sdpa_llava.model, "uniform:6").remove()


def test_nested_contexts_restore_in_order(sdpa_llava):
    inputs = sdpa_llava.inputs()

    def entering(handle):
        with torch.no_grad():
            sdpa_llava.model(**inputs)
        return handle.report.entering

    with torch.no_grad():
        sdpa_llava.model(**inputs)  # transformers installs its own capture hooks once
    before = fingerprint(sdpa_llava.model)
    with vtc.compress(sdpa_llava.model, "random:9") as outer:
        assert entering(outer) == (9,)
        with vtc.compress(sdpa_llava.model, "random:4") as inner:
            assert entering(inner) == (4,)
            assert not outer.active
        assert outer.active
        assert not inner.active
        assert entering(outer) == (9,)
    assert fingerprint(sdpa_llava.model) == before


def test_an_exception_in_the_block_restores(sdpa_llava):
    before = fingerprint(sdpa_llava.model)
    with pytest.raises(RuntimeError, match="mine"), vtc.compress(sdpa_llava.model, "random:9"):
        raise RuntimeError("mine")
    assert fingerprint(sdpa_llava.model) == before


def test_an_exception_in_the_forward_leaves_no_state(sdpa_llava):
    inputs = sdpa_llava.inputs()
    with vtc.compress(sdpa_llava.model, "random:6 + fastv@2:3"), torch.no_grad():
        expected = sdpa_llava.model(**inputs).logits
        blow = sdpa_llava.model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sdpa_llava.model(**inputs)
        blow.remove()
        assert FORWARD.get() is None
        blow = sdpa_llava.model.model.vision_tower.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sdpa_llava.model(**inputs)
        blow.remove()
        assert ENCODE.get() is None
        assert torch.equal(sdpa_llava.model(**inputs).logits, expected)


def test_a_failing_installation_leaves_nothing(sdpa_llava, monkeypatch):
    before = fingerprint(sdpa_llava.model)
    assert "get_image_features" not in vars(sdpa_llava.model.model)
    monkeypatch.setattr(tower_signals, "_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vtc.patch(sdpa_llava.model, "fastervlm:6")
    assert fingerprint(sdpa_llava.model) == before
    monkeypatch.undo()
    vtc.patch(sdpa_llava.model, "fastervlm:6").remove()


def test_generate_still_reads_the_signatures(sdpa_llava):
    inner = sdpa_llava.model.model
    stock = inspect.signature(inner.get_image_features)
    with vtc.compress(sdpa_llava.model, "random:6"):
        assert inspect.signature(inner.get_image_features) == stock
    assert "get_image_features" not in vars(inner)


def test_hooks_of_the_user_keep_working(sdpa_llava):
    seen = []
    hook = sdpa_llava.model.model.language_model.register_forward_hook(lambda m, a, o: seen.append(o[0].shape[1]))
    inputs = sdpa_llava.inputs()
    with vtc.compress(sdpa_llava.model, "random:6"), torch.no_grad():
        out = sdpa_llava.model(**inputs, output_hidden_states=True)
    hook.remove()
    assert seen  # registered before the patch: sees the short sequence
    assert out.logits.shape[1] == inputs["input_ids"].shape[1]


def test_the_report_counts_what_the_cache_holds(sdpa_llava):
    inputs = sdpa_llava.inputs()
    with vtc.compress(sdpa_llava.model, "fastervlm:9 + fastv@2:4") as handle, torch.no_grad():
        cache = names.cache_of(sdpa_llava.model(**inputs, use_cache=True))
        report = handle.report
    assert report.visual_tokens == (16,)
    assert report.entering == (9,)
    assert report.after_last_cut == (4,)
    assert report.layer_average == (6.5,)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report.kv_bytes == held
    assert report.kv_bytes_dense == held // (17 + 17 + 12 + 12) * 24 * 4
    assert set(report.selection_ms) == {"tower_out", "llm_in", "layer[2]"}
    assert report.token_map.lengths == (4,)
    text = str(report)
    assert "fastervlm:9 + fastv:4 on llava" in text
    assert "16" in text
    assert report.to_dict()["layer_average"] == (6.5,)


def test_a_forgotten_model_goes_away_with_its_patch():
    case = tiny("llava")
    model, handle = weakref.ref(case.model), vtc.patch(case.model, "random:6")
    with torch.no_grad():
        case.model(**case.inputs([("image", 3)]))
    del case
    assert handle.report.entering == (6,)
    del handle
    gc.collect()
    assert model() is None


def test_a_patch_lasts_without_its_handle(sdpa_llava):
    vtc.patch(sdpa_llava.model, "random:6")
    gc.collect()
    with pytest.raises(vtc.errors.StateError, match="already patched"):
        vtc.patch(sdpa_llava.model, "random:6")
    with vtc.compress(sdpa_llava.model, "random:4"):
        pass
    active_on(sdpa_llava.model).remove()


@pytest.mark.parametrize("family", families())
def test_the_anatomy_is_read_once(family):
    """Not anew at every generated token, where it was walked through each time."""
    with vtc.compress(tiny(family).model, "random:6") as handle:
        assert handle._adapter.encoders is handle._adapter.encoders
        assert handle._plan.tower is handle._plan.tower
