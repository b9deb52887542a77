"""Methods composed by spec strings: exact by the oracle, with the right numbers, and refused where they cannot be."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.eval.data import suites
from vtc.loading import load
from vtc.testing import masked_logits, relative_difference, visible_columns
from vtc.testing.tiny import PROMPTS

TOLERANCE = 1e-5
LAYERS = 4
STEPS = 4

#: spec -> visual tokens of an image of 16 at each decoder layer, and the layers in which they are frozen
SPECS = {
    "visionzip:9 + dart@2:5": ((9, 9, 5, 5), ()),
    "fastervlm:12 + pyramiddrop@1|2|3:2": ((12, 8, 4, 2), ()),
    "divprune:10 + fastv@1:6 + dart@3:4": ((10, 6, 6, 4), ()),
    "shortv@0|3 + fastv@2:6": ((16, 16, 6, 6), (0, 3)),
    "fastervlm:9 + shortv@2|3": ((9, 9, 9, 9), (2, 3)),
    "shortv@2 + pyramiddrop@1|3:4": ((16, 8, 8, 4), (2,)),
    "fastervlm:12 + lvlm-csp@1|2|3:5(clusters=0.25)": ((12, 4, 12, 5), ()),
    "shortv@1 + todre:7(tau=1.0)": ((7, 7, 7, 0), (1,)),
    "todre:7(tau=0.0) + topv@2:5": ((7, 7, 5, 5), ()),
    "star@2:4(share=0.5) + shortv@1": ((10, 10, 4, 4), (1,)),
}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("spec", SPECS)
def test_compositions_are_exact_and_counted(llava, spec, prompts):
    inputs = llava.inputs(prompts)
    model, length = llava.model, inputs["input_ids"].shape[1]
    per_layer, frozen = SPECS[spec]
    with vtc.compress(model, spec, positions="original") as handle, torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        report = handle.report
    images = [prompt.count("image") for prompt in prompts]
    assert report.per_layer == report.kv_tokens == tuple(tuple(n * k for k in images) for n in per_layer)
    assert report.entering == report.per_layer[0]
    assert report.after_last_cut == report.per_layer[-1]
    assert report.layer_average == tuple(sum(per_layer) / LAYERS * k for k in images)
    assert report.visual_tokens == tuple(16 * k for k in images)
    assert report.flops < report.flops_dense

    dense = STEPS - 1
    full = {
        **inputs,
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, dense), value=1),
    }
    visible = visible_columns(names.cache_of(out), length, dense)
    is_visual = full["input_ids"] == llava.placeholder

    def unchanged(layer):
        return is_visual if layer in frozen else is_visual & ~visible(layer)

    expected = masked_logits(model, full, visible, replace=(is_visual, features), unchanged=unchanged)
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    for layer in range(LAYERS):
        assert (visible(layer) & is_visual).sum(1).tolist() == list(report.per_layer[layer])


#: on the embedded model, with 576 visual tokens and 8 layers: the same by the numbers that a user would write
NAMED = {
    "visionzip:128 + dart@2:64": (128, 128, *[64] * 6),
    "fastervlm:128 + pyramiddrop:16": (128, 128, 128, 128, 52, 52, 16, 16),
    "shortv:0.5(calibration=scenes-llava) + fastv:64": (576, 576, *[64] * 6),
    "mustdrop:400 + mustdrop-llm:64": None,
}


@pytest.fixture(scope="module")
def embedded():
    loaded = load(attention="sdpa")
    items = suites.scenes(1, seed=2, split="val").items[:2]
    return loaded, loaded.batch([item.image for item in items], [item.question for item in items])


@pytest.mark.parametrize("spec", NAMED)
def test_on_the_embedded_model(embedded, spec):
    loaded, inputs = embedded
    model, length = loaded.model, inputs["input_ids"].shape[1]
    is_visual = inputs["input_ids"] == model.config.image_token_index
    frozen = {stage.site.index for m in vtc.parse(spec) for stage in m.stages_in(8) if stage.freezes}
    entering = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with vtc.compress(model, spec, positions="original") as handle, torch.no_grad():
        out = model(**inputs)
        report = handle.report
    hook.remove()
    if NAMED[spec] is not None:
        assert report.per_layer == tuple((n, n) for n in NAMED[spec])
        visible = visible_columns(names.cache_of(out), length)
        expected = masked_logits(
            model,
            inputs,
            visible,
            replace=(is_visual, entering[0][is_visual]),
            unchanged=lambda layer: is_visual if layer in frozen else is_visual & ~visible(layer),
        )
        text = inputs["attention_mask"].bool() & ~is_visual
        assert relative_difference(out.logits[text], expected[text]) < TOLERANCE
    else:  # its counts follow from the images
        for sample in range(2):
            counts = [layer[sample] for layer in report.per_layer]
            assert counts == sorted(counts, reverse=True)
            assert counts[0] <= 400
            assert counts[-1] <= 64 < counts[0]
            held = [layer[sample] for layer in report.kv_tokens]
            assert held == [counts[0], *[counts[-1]] * 7]


@pytest.mark.parametrize(
    ("spec", "budget", "error", "message"),
    [
        ("shortv@1|3 + fastv@2:6", None, errors.UnsupportedFeatureError, "of layer 1, in which shortv at layer"),
        ("shortv@1 + fastv@2", 6, errors.BudgetError, "token budgets to other methods only: 'shortv [+] fastv:64'"),
        ("shortv@1 + shortv@1|2", None, errors.SpecError, "both freeze layer 1"),
        ("lvlm-csp@0|2|3:5 + fastv@1:6", None, errors.SpecError, "tokens parked until layer 2"),
        ("shortv@4 + fastv@2:6", None, errors.SpecError, r"layers 0\.\.3"),
        ("lvlm-csp@0|2|3:5 + mustdrop-llm@2:8", None, errors.SpecError, "evicts from layers"),
    ],
)
def test_refused(sdpa_llava, spec, budget, error, message):
    with pytest.raises(error, match=message):
        vtc.patch(sdpa_llava.model, spec, budget=budget)
