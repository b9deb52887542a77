"""The probe on a config of each family, without weights."""

import pytest

import vtc
from vtc.eval.probe.doctor import diagnose
from vtc.testing import families, tiny


@pytest.mark.parametrize("family", families())
def test_config_only_model(family, tmp_path):
    tiny(family).model.config.save_pretrained(tmp_path)
    found = diagnose(str(tmp_path))
    assert found.family == family
    assert set(found.runs) | set(found.refused) == set(vtc.methods())
    assert {"random", "uniform", "pool", "divprune"} <= set(found.runs)
    assert all(len(reason) > 40 for reason in found.refused.values())
    assert "image" in found.parts


@pytest.mark.parametrize("family", families())
def test_every_part_of_a_config_only_model_is_named(family, tmp_path):
    one = tiny(family)
    one.model.config.save_pretrained(tmp_path)
    found = diagnose(str(tmp_path))
    assert found.parts["class"] == type(one.model).__name__
    assert ("video" in found.parts) == one.has_video
    assert f"{one.model.config.get_text_config().num_hidden_layers} layers" in found.parts["language model"]
    assert str(one.placeholder) in found.parts["image"]


def test_a_family_that_no_adapter_serves(tmp_path):
    from transformers import AriaConfig

    AriaConfig(text_config={"num_hidden_layers": 1, "hidden_size": 32}).save_pretrained(tmp_path)
    with pytest.raises(vtc.errors.UnsupportedModelError, match=r"'aria'.*Supported: .*qwen2_5_vl.*docs/adapters\.md"):
        diagnose(str(tmp_path))


def test_a_model_without_images(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(vtc.errors.UnsupportedModelError, match=r"'llama' is no image-text-to-text model.*vtc models"):
        diagnose(str(tmp_path))


def test_a_folder_without_config(tmp_path):
    with pytest.raises(vtc.errors.UnsupportedModelError, match="cannot read the config"):
        diagnose(str(tmp_path))
