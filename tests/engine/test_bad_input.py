"""Bad input gets one clear error, and the model is left as it was."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import vtc
from vtc import errors
from vtc.testing import tiny


@pytest.mark.parametrize(
    ("spec", "budget", "error", "message"),
    [
        ("fastvv", 6, errors.SpecError, "Did you mean 'fastv'"),
        ("", 6, errors.SpecError, "empty"),
        ("random", None, errors.BudgetError, "has no budget"),
        ("random", 0, errors.BudgetError, "at least 1"),
        ("random", -3, errors.BudgetError, "at least 1"),
        ("random", 0.0, errors.BudgetError, r"\(0, 1\]"),
        ("random", 64.0, errors.BudgetError, "use an integer"),
        ("random", True, errors.BudgetError, "not an integer"),
        ("random:six", None, errors.BudgetError, "not a number"),
        ("random:0", None, errors.BudgetError, "at least 1"),
        ("random(sead=3)", 6, errors.SpecError, "no option 'sead'"),
        ("random(seed=x)", 6, errors.SpecError, "int"),
        ("random@2", 6, errors.SpecError, "no place"),
        ("fastv@9", 6, errors.SpecError, "layers 1..3"),
        ("fastv@0", 6, errors.SpecError, "layers 1..3"),
        ("fastv(query=first)", 6, errors.SpecError, "'last', 'mean'|last, mean"),
        ("visionzip(contextual=2.0)", 6, errors.SpecError, "share"),
        ("random:6)", None, errors.SpecError, "cannot read"),
        ([], 6, errors.SpecError, "a spec is"),
    ],
)
def test_bad_spec(sdpa_llava, spec, budget, error, message):
    with pytest.raises(error, match=message):
        vtc.patch(sdpa_llava.model, spec, budget)
    vtc.patch(sdpa_llava.model, "random", 6).remove()


def test_unknown_position_policy(sdpa_llava):
    with pytest.raises(errors.SpecError, match="'original'"):
        vtc.patch(sdpa_llava.model, "random:6", positions="short")


def test_budget_above_n_keeps_all_and_says_so(sdpa_llava):
    with vtc.compress(sdpa_llava.model, "random:99") as handle, torch.no_grad():
        sdpa_llava.model(**sdpa_llava.inputs())
        assert handle.report.entering == (16,)
        assert "covers all 16 tokens" in handle.report.notes[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["fastervlm:6", "random:6", "divprune:6"])
def test_pixels_that_are_not_finite(sdpa_llava, spec, bad):
    inputs = sdpa_llava.inputs()
    expected = sdpa_llava.model(**inputs).logits
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"][0, 0, 3, 3] = bad
    with vtc.compress(sdpa_llava.model, spec), pytest.raises(errors.InputError, match="NaN or infinite"):
        sdpa_llava.model(**broken)
    assert torch.equal(sdpa_llava.model(**inputs).logits, expected)


def test_hidden_states_that_are_not_finite(sdpa_llava):
    with torch.no_grad():
        sdpa_llava.model.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with vtc.compress(sdpa_llava.model, "fastv@2:6"), pytest.raises(errors.InputError, match=r"fastv at layer\[2\]"):
        sdpa_llava.model(**sdpa_llava.inputs())


def test_inputs_embeds_without_ids(sdpa_llava):
    inputs = sdpa_llava.inputs()
    embeds = sdpa_llava.model.get_input_embeddings()(inputs.pop("input_ids"))
    with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(errors.InputError, match="Pass input_ids"):
        sdpa_llava.model(inputs_embeds=embeds, **inputs)


def test_more_placeholders_than_images(sdpa_llava):
    inputs = sdpa_llava.inputs([("image", 3, "image")])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with (
        vtc.compress(sdpa_llava.model, "random:6"),
        pytest.raises((errors.InputError, ValueError), match=r"match|hold"),
    ):
        sdpa_llava.model(**inputs)


def test_images_in_the_wrong_prompts(sdpa_llava):
    inputs = sdpa_llava.inputs([("image", 3), ("image", 3)])
    ids = inputs["input_ids"]
    ids[0, -3:] = sdpa_llava.placeholder  # as many placeholders as features in all, but not per image
    ids[1, :3] = 7
    with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(errors.InputError, match="its images give"):
        sdpa_llava.model(**inputs)


def test_mask_of_the_wrong_length(sdpa_llava):
    inputs = sdpa_llava.inputs()
    inputs["attention_mask"] = inputs["attention_mask"][:, :-2]
    with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(errors.InputError, match="attention_mask covers"):
        sdpa_llava.model(**inputs)


def test_another_feature_layer_per_call(sdpa_llava):
    inputs, refused = sdpa_llava.inputs(), pytest.raises(errors.UnsupportedFeatureError, match="vision_feature_layer")
    with vtc.compress(sdpa_llava.model, "fastervlm:6"), refused:
        sdpa_llava.model(**inputs, vision_feature_layer=-1)


def test_not_a_model():
    # in a process of its own: the type checker of the tests would speak first
    code = "import vtc; vtc.patch('llava-hf/llava-1.5-7b-hf', 'random:6')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnsupportedModelError: patch needs a loaded model, not str" in done.stderr


def test_model_without_adapter():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    )
    with pytest.raises(errors.UnsupportedModelError, match=r"'llama'.*Supported: "):
        vtc.patch(LlamaForCausalLM(config), "random:6")
    with pytest.raises(errors.UnsupportedModelError, match="no config"):
        vtc.patch(torch.nn.Linear(2, 2), "random:6")


def test_meta_weights():
    config = tiny("llava").model.config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with pytest.raises(errors.UnsupportedModelError, match="meta device"):
        vtc.patch(model, "random:6")


def test_compiled_model(sdpa_llava):
    with pytest.raises(errors.UnsupportedFeatureError, match="compiled"):
        vtc.patch(torch.compile(sdpa_llava.model), "random:6")


def test_tower_without_cls():
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=200)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=199, vision_feature_select_strategy="full"
    )
    model = LlavaForConditionalGeneration(config)
    with pytest.raises(errors.SignalUnavailableError, match=r"no \[CLS\]"):
        vtc.patch(model, "fastervlm:6")
    ids = torch.tensor([[3, *[199] * 16, 4]])
    with vtc.compress(model, "fastervlm:6(score=received)") as handle, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28))
        assert handle.report.entering == (6,)


def test_tower_of_another_shape():
    from transformers import PixtralVisionConfig

    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=200)
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=199,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with pytest.raises(errors.UnsupportedModelError, match="PixtralVisionModel"):
        vtc.patch(LlavaForConditionalGeneration(config), "random:6")


def test_cls_among_the_features():
    """The "full" strategy leaves [CLS] in the prompt as a token without a place on the grid."""
    base = tiny("llava").model.config
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**base.vision_config.to_dict()),
        text_config=base.text_config,
        image_token_index=199,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, *[199] * 17, 4]])
    with vtc.compress(model, "fastervlm:6") as handle, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28))
        assert handle.report.visual_tokens == (17,)
        assert handle.report.entering == (6,)
        assert handle.report.layout.row[0, 0] == -1
    with pytest.raises(errors.SignalUnavailableError, match="'full' already keeps"):
        vtc.patch(model, "visionzip:6")


def test_placeholders_without_images(sdpa_llava):
    inputs = sdpa_llava.inputs()
    del inputs["pixel_values"]
    with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(errors.InputError, match="no images came with it"):
        sdpa_llava.model(**inputs)
