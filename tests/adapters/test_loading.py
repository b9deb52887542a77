"""However a model was loaded or wrapped: auto class, PEFT, accelerate's hooks, half precision."""

import copy

import pytest
import torch

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

SPEC = "random:6 + fastv@3:4"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [195, 196, 197, 198, 199]}


def check(patched, one, inputs, spec=SPEC):
    """Patch `patched` and compare with the masked full model `one.model` of the same weights."""
    with vtc.compress(patched, spec, positions="original") as handle, torch.no_grad():
        output = patched(**inputs, use_cache=True)
        report = handle.report
        generated = patched.generate(**inputs, **GREEDY)
    visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
    kept = visible(3) & inputs["attention_mask"].bool()
    expected = masked_logits(one.model, inputs, visible)
    assert relative_difference(output.logits[kept], expected[kept]) < 1e-5
    assert sum(report.after_last_cut) < sum(report.visual_tokens)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]
    return generated


@pytest.mark.parametrize("family", families())
def test_saved_and_loaded_by_the_auto_class(family, tmp_path):
    from transformers import AutoModelForImageTextToText

    one = tiny(family)
    one.model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert type(loaded) is type(one.model)
    assert adapter_for(loaded).family == family
    check(loaded, one, one.inputs(PROMPTS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
class TestPeft:
    @pytest.fixture(params=["llava", "qwen2_5_vl", "smolvlm"])
    def lora(self, request):
        """A model under LoRA whose adapters are no longer zero, and a twin with the adapters merged in."""
        peft = pytest.importorskip("peft")
        one = tiny(request.param)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(one.model, config).eval()
        return one, wrapped

    def test_lora_is_looked_through(self, lora):
        one, wrapped = lora
        inputs = one.inputs(PROMPTS)
        with torch.no_grad():
            before = wrapped(**inputs).logits
            with wrapped.disable_adapter():
                assert not torch.equal(wrapped(**inputs).logits, before), "the adapters do nothing"
        generated = check(wrapped, one, inputs)  # one.model holds the same LoRA layers
        with vtc.compress(one.model, SPEC, positions="original"):
            assert torch.equal(one.model.generate(**inputs, **GREEDY), generated)
        with torch.no_grad():
            assert torch.equal(wrapped(**inputs).logits, before)

    def test_patched_through_the_wrapper_is_patched(self, lora):
        one, wrapped = lora
        handle = vtc.patch(wrapped, SPEC)
        with pytest.raises(errors.StateError, match="already patched"):
            vtc.patch(one.model, SPEC)
        handle.remove()

    def test_merged(self, lora):
        one, wrapped = lora
        inputs = one.inputs(PROMPTS)
        with torch.no_grad():
            expected = wrapped(**inputs).logits
        merged = copy.deepcopy(wrapped).merge_and_unload()
        with torch.no_grad():
            assert relative_difference(merged(**inputs).logits, expected) < 1e-5
        check(merged, one, inputs)


class TestDispatch:
    """`device_map` puts accelerate's hooks on every module; ours run beside them."""

    @pytest.mark.parametrize("family", families())
    def test_on_one_device(self, family):
        from accelerate import dispatch_model

        one, inputs = tiny(family), tiny(family).inputs(PROMPTS)
        twin = tiny(family).model
        names = {name: "cpu" for name, _ in twin.named_children()}
        dispatched = dispatch_model(twin, device_map=names, main_device="cpu", force_hooks=True)
        assert any(hasattr(module, "_hf_hook") for module in dispatched.modules())
        check(dispatched, one, inputs)
        check(dispatched, one, inputs, "fastervlm:6(score=received)")

    def test_loaded_with_a_device_map(self, tmp_path):
        from transformers import AutoModelForImageTextToText

        one = tiny("llava")
        one.model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
        check(loaded, one, one.inputs(PROMPTS))

    def test_offloaded_weights_are_refused(self, tmp_path):
        from accelerate import disk_offload

        model = tiny("llava").model
        disk_offload(model, tmp_path, execution_device="cpu")
        with pytest.raises(errors.UnsupportedModelError, match=r"meta device \(offloaded.*device_map"):
            vtc.patch(model, SPEC)


#: how far rounding may move the logits of a four-layer model, relative to the largest
ROUNDING = {torch.bfloat16: 6e-2, torch.float16: 1e-2}


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", ROUNDING, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", families())
    def test_equals_the_masked_model_up_to_rounding(self, family, attention, dtype):
        one = tiny(family, attention)
        scale_down(one.model)
        one.model.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in one.inputs(PROMPTS).items()}
        with vtc.compress(one.model, "uniform:6 + dart@3:4", positions="original") as handle, torch.no_grad():
            output = one.model(**inputs, use_cache=True)
            assert handle.report.entering[0] >= 6
        assert output.logits.dtype == dtype
        assert all(layer.keys.dtype == dtype for layer in names.cache_of(output).layers)
        visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
        kept = visible(3) & inputs["attention_mask"].bool()
        expected = masked_logits(one.model, inputs, visible)
        assert torch.isfinite(output.logits[kept]).all()
        assert relative_difference(output.logits[kept].float(), expected[kept].float()) < ROUNDING[dtype]

    @pytest.mark.parametrize("dtype", ROUNDING, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("family", families())
    def test_signals_of_the_tower(self, family, dtype):
        one = tiny(family)
        scale_down(one.model)
        one.model.to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in one.inputs(PROMPTS).items()}
        with vtc.compress(one.model, "visionzip:6(score=received)") as handle, torch.no_grad():
            logits = one.model(**inputs).logits
            assert handle.report.after_last_cut[0] < handle.report.visual_tokens[0]
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()


def scale_down(model):
    """Weights of a trained model's size: those of the tiny one overflow fp16 and drown bf16 in rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
