"""SmolVLM and Idefics3 with `pixel_attention_mask`: patches of the padding are no queries and no keys of the tower."""

import importlib

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.methods.fastervlm import FasterVLM
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Budget

FAMILIES = ("idefics3", "smolvlm")
SIDE, PATCH = 24, 3


def padded_inputs(one):
    """Tiles that end on the right, at the bottom, at both, in the middle of a patch; and whole ones."""
    inputs = one.inputs(PROMPTS)
    pixels = inputs["pixel_values"]
    mask = torch.zeros(*pixels.shape[:2], SIDE, SIDE, dtype=torch.long)
    sizes = [(24, 15), (9, 24), (12, 10), (24, 24)]
    number = 0
    for prompt in range(len(pixels)):
        for tile in range(pixels.shape[1]):
            if bool(pixels[prompt, tile].any()):
                height, width = sizes[number % len(sizes)]
                mask[prompt, tile, :height, :width] = 1
                number += 1
    assert number == 4
    inputs["pixel_values"] = pixels * mask[:, :, None]
    return {**inputs, "pixel_attention_mask": mask}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("spec", ["random:5", "fastervlm:6(score=received)", "fastervlm:9(score=received) + fastv@3:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_masked_model(family, spec, attention):
    one = tiny(family, attention)
    inputs = padded_inputs(one)
    with torch.no_grad():
        whole = one.model(**{**inputs, "pixel_attention_mask": torch.ones_like(inputs["pixel_attention_mask"])}).logits
        assert not torch.equal(one.model(**inputs).logits, whole), "the mask does nothing"
        with vtc.compress(one.model, spec, positions="original"):
            output = one.model(**inputs, use_cache=True)
            generated = one.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
    kept = visible(3) & inputs["attention_mask"].bool()
    expected = masked_logits(one.model, inputs, visible)
    assert relative_difference(output.logits[kept], expected[kept]) < 1e-5
    assert torch.equal(generated[:, inputs["input_ids"].shape[1]], output.logits[:, -1].argmax(-1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_that_of_the_image(family, attention, monkeypatch):
    """Against the weights of the host's own eager attention: the mean over queries of the image; padding gets none."""
    one, twin = tiny(family, attention), tiny(family, "eager")
    inputs, found, weights = padded_inputs(one), {}, {}
    tower = adapter_for(twin.model).encoders[0]
    host = importlib.import_module(type(tower.tower).__module__)
    stock = host.eager_attention_forward

    def recording(module, *args, **kwargs):
        output, probabilities = stock(module, *args, **kwargs)
        if module is tower.signal_block.self_attn:
            weights["all"] = probabilities.mean(dim=1)
        return output, probabilities

    class Probe(FasterVLM):
        def filter(self, tokens):
            found["received"] = tokens.signal("received_attention")
            return super().filter(tokens)

    with vtc.compress(one.model, Probe(budget=Budget(tokens=5), score="received")), torch.no_grad():
        one.model(**inputs)
    monkeypatch.setattr(host, "eager_attention_forward", recording)
    with torch.no_grad():
        twin.model(**inputs)
    mask = inputs["pixel_attention_mask"][inputs["pixel_values"].flatten(2).any(-1)]
    image = torch.nn.functional.max_pool2d(mask.float(), PATCH).flatten(1)
    mean = (weights["all"] * image[:, :, None]).sum(1) / image.sum(1, keepdim=True)
    expected = tower.pool(mean[..., None], inputs)[..., 0]
    torch.testing.assert_close(found["received"], expected)
    shuffled = tower.pool(image[..., None], inputs)[..., 0]
    assert bool((found["received"][shuffled == 0] == 0).all())
    assert bool((shuffled == 0).any())
