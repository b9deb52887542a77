"""PyramidDrop against the authors' code, its schedules, and options that cannot be."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import tiny
from vtc.testing.end_to_end import replay
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS

CASES = golden_cases("pyramiddrop", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_end_to_end(case):
    start, count = case.number("image_start"), case.number("image_len")
    heads = case.number("num_heads")
    run = replay(
        case, (start, start + count), list(case["decode_embeds"]), num_attention_heads=heads, num_key_value_heads=heads
    )
    ratios, layers = case["ratios"].tolist(), tuple(case["layer_list"].tolist())
    assert ratios == [ratios[0] ** cut for cut in range(1, len(ratios) + 1)]
    with vtc.compress(run.model, vtc.create("pyramiddrop", layers=layers, ratio=ratios[0])) as handle:
        out = run.prefill(handle)
        cache = names.cache_of(out)
        kept = torch.arange(case["inputs_embeds"].shape[1])
        for stage, layer in enumerate(layers):
            kept = kept[case[f"stage{stage}_keep_in_current_seq"]]
            assert torch.equal(cache._vtc.layers[layer].column[0], kept)
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert lengths == case["prefill_cache_len_per_layer"].tolist()
        torch.testing.assert_close(out.last_hidden_state[:, kept], case["prefill_last_hidden"], atol=1e-5, rtol=1e-5)
        for step, expected in enumerate(case["decode_last_hidden"]):
            hidden = run.decode(step, cache).last_hidden_state
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def counts(method, total):
    """Tokens that stay after each cut, of `total`."""
    return [stage.schedule(total, *method.budget_for(stage).resolve((total,))) for stage in method.stages()]


def test_the_papers_setting_is_the_default_budget():
    method = vtc.create("pyramiddrop", budget=vtc.catalogue.registry.method_class("pyramiddrop").defaults["llava"])
    assert counts(method, 576) == [288, 144, 72]
    assert counts(vtc.create("pyramiddrop", ratio=0.5), 576) == [288, 144, 72]
    assert counts(vtc.create("pyramiddrop", ratio=0.5), 61) == [30, 15, 7]


@pytest.mark.parametrize("budget", [0.26, 0.34, 0.46875, 0.7, 1.0])
@pytest.mark.parametrize("layers", [(), (3, 9)])
def test_an_average_is_met(budget, layers):
    method = vtc.create("pyramiddrop", budget=budget, convention="average", layers=layers)
    if layers and budget < 0.34:
        return
    stages = [576, *counts(method, 576)]
    assert stages == sorted(stages, reverse=True)
    assert abs(sum(stages) / len(stages) - budget * 576) < 1


def test_a_final_count_is_met_whatever_the_layers():
    for budget in (1, 7, 64, 575, 576):
        steps = counts(vtc.create("pyramiddrop", budget=budget, layers=(2, 3, 5, 8)), 576)
        assert steps[-1] == budget
        assert steps == sorted(steps, reverse=True)


def test_layers_are_shares_of_the_depth_or_numbers():
    llava = tiny("llava")
    inputs = llava.inputs(PROMPTS)
    with torch.no_grad():
        with vtc.compress(llava.model, "pyramiddrop:2") as handle:
            llava.model(**inputs)
            assert handle.report.per_layer == ((16, 32, 0), (8, 16, 0), (4, 8, 0), (2, 4, 0))
        with vtc.compress(llava.model, "pyramiddrop@1|3:4") as handle:
            llava.model(**inputs)
            assert handle.report.per_layer == ((16, 32, 0), (8, 16, 0), (8, 16, 0), (4, 8, 0))
        with vtc.compress(llava.model, "pyramiddrop@1|3(ratio=0.3)") as handle:
            llava.model(**inputs)
            assert handle.report.per_layer == ((16, 32, 0), (4, 9, 0), (4, 9, 0), (1, 2, 0))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"layers": (4, 2)}, errors.SpecError, "ascending"),
        ({"layers": (0, 2)}, errors.SpecError, "from 1 on"),
        ({"ratio": 1.0}, errors.SpecError, "ratio=1.0"),
        ({"convention": "mean"}, errors.SpecError, "convention='mean'"),
    ],
)
def test_options_that_cannot_be(options, error, says):
    with pytest.raises(error, match=says):
        vtc.create("pyramiddrop", budget=8, **options)


def test_what_no_schedule_can_meet():
    llava = tiny("llava")
    inputs = llava.inputs()
    with torch.no_grad():
        before = llava.model(**inputs).logits
        refused = pytest.raises(errors.BudgetError, match="more than 4 are needed")
        with vtc.compress(llava.model, "pyramiddrop:3(convention=average)"), refused:
            llava.model(**inputs)
        assert torch.equal(llava.model(**inputs).logits, before)
    with pytest.raises(errors.BudgetError, match="no budget"):
        vtc.patch(llava.model, "pyramiddrop")
    with pytest.raises(errors.SpecError, match=r"layers 0\.\.3"):
        vtc.patch(llava.model, "pyramiddrop@2|4:3")
