"""A family is one file: here a toy one, registered by this test, runs through the same oracle as the others."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vtc
from vtc import adapter as registry
from vtc import errors
from vtc.adapter import Encoder, adapter_for, register_adapter
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._vit import tower_attention, tower_layers
from vtc.catalogue.capabilities import describe_adapter
from vtc.engine.host import names
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout


class ToyConfig(LlavaConfig):
    model_type = "toy_vlm"


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = ToyConfig


@pytest.fixture
def toy(monkeypatch):
    """A model of a family that nobody knows."""
    registry.adapter_classes()  # the known families are loaded
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    base = tiny("llava")
    config = ToyConfig.from_dict({**base.model.config.to_dict(), "model_type": "toy_vlm"})
    config._attn_implementation = "sdpa"
    model = ToyForConditionalGeneration(config).eval()
    model.load_state_dict(base.model.state_dict())
    return model


def test_an_unknown_family_is_told_what_is_missing(toy):
    with pytest.raises(errors.UnsupportedModelError, match=r"'toy_vlm'.*Supported: .*llava.*docs/adapters.md"):
        vtc.patch(toy, "random:5")


def test_one_class_makes_it_known(toy):
    @register_adapter
    class ToyAdapter(LlamaAdapter):
        family = "toy"
        model_types = ("toy_vlm",)
        checkpoints = ("someone/toy-vlm-1b",)

        @property
        def encoders(self):
            block = tower_layers(self.inner.vision_tower)[-2]
            return (
                Encoder(
                    modality="image",
                    method="get_image_features",
                    placeholder_id=self.model.config.image_token_id,
                    tower=self.inner.vision_tower,
                    features=self.inner.multi_modal_projector,
                    feature_layers=(block,),
                    attention=tower_attention(block),
                    num_prefix=1,
                    drops_prefix=True,
                ),
            )

        def layout(self, encoder, output, arguments):
            images = output.pooler_output
            side = round(len(images[0]) ** 0.5)
            return (side * side,) * len(images), Layout.grid(side, side, len(images), device=images[0].device)

    inputs = tiny("llava").inputs(PROMPTS)
    for spec in ("random:5", "fastervlm:6 + fastv@2:4"):
        with vtc.compress(toy, spec, positions="original") as handle, torch.no_grad():
            output = toy(**inputs, use_cache=True)
            assert handle.report.family == "toy"
        visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
        kept = visible(3) & inputs["attention_mask"].bool()
        expected = masked_logits(toy, inputs, visible)
        assert relative_difference(output.logits[kept], expected[kept]) < 1e-5
    found = describe_adapter(adapter_for(toy))
    assert found["checkpoints"] == ["someone/toy-vlm-1b"]
    assert "cls_attention" in found["sites"]["tower_out"]["signals"]
