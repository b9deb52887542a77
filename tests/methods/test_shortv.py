"""ShortV against the authors' code, its lists of layers, and its calibration."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.eval.data import suites
from vtc.eval.probe import calibrate
from vtc.loading import load
from vtc.methods.shortv import PUBLISHED
from vtc.testing import tiny
from vtc.testing.end_to_end import replay
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS

CASES = golden_cases("shortv", Path(__file__).parents[1] / "golden")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def played(case):
    start, count, heads = (case.number(name) for name in ("image_start", "image_len", "num_heads"))
    head_dim = case["inputs_embeds"].shape[2] // heads
    groups = case["w.layers.0.self_attn.k_proj.weight"].shape[0] // head_dim
    span = (start, start + count)
    return replay(case, span, list(case["decode_embeds"]), num_attention_heads=heads, num_key_value_heads=groups), span


def frozen(*layers):
    return vtc.create("shortv", layers=layers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_end_to_end(case):
    run, span = played(case)
    head = case["lm_head"].T
    layers = tuple(case["replaced_layers"].tolist())
    left = {}
    with vtc.compress(run.model, frozen(*layers)) as handle:
        # behind the hooks of the handle, which put the rows of a frozen layer together again
        hooks = [
            layer.register_forward_hook(lambda module, args, output, index=index: left.update({index: output}))
            for index, layer in enumerate(run.model.model.language_model.layers)
        ]
        out = run.prefill(handle)
        for hook in hooks:
            hook.remove()
        entered = {0: case["inputs_embeds"], **{index + 1: output for index, output in left.items()}}
        for name in case.arrays:
            if name.startswith("hidden_after_layer"):
                torch.testing.assert_close(left[int(name.removeprefix("hidden_after_layer"))], case[name], **CLOSE)
        image = slice(*span)
        for index, output in left.items():
            assert torch.equal(output[:, image], entered[index][:, image]) == (index in layers)
            assert not torch.equal(output[:, span[1] :], entered[index][:, span[1] :])
        torch.testing.assert_close(out.last_hidden_state @ head, case["prefill_logits"], **CLOSE)
        lengths = [layer.keys.shape[2] for layer in names.cache_of(out).layers]
        assert lengths == case["prefill_cache_len_per_layer"].tolist()
        for step, expected in enumerate(case["decode_logits"]):
            hidden = run.decode(step, names.cache_of(out)).last_hidden_state
            torch.testing.assert_close(hidden @ head, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_without_frozen_layers(case):
    run, _ = played(case)
    with vtc.compress(run.model, vtc.create("shortv", layers=(1, 3), budget=1.0)) as handle:
        out = run.prefill(handle)
        logits = out.last_hidden_state[:, -1] @ case["lm_head"].T
        torch.testing.assert_close(logits, case["vanilla_logits_last"], **CLOSE)
        for step, expected in enumerate(case["decode_logits_vanilla"]):
            hidden = run.decode(step, names.cache_of(out)).last_hidden_state
            torch.testing.assert_close(hidden @ case["lm_head"].T, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_contributions(case):
    run, _ = played(case)
    scores = []
    head = case["lm_head"].T

    def next_token(method):
        with vtc.compress(run.model, method) as handle:
            return (run.prefill(handle).last_hidden_state[:, -1] @ head).double().log_softmax(dim=-1)

    full = next_token(vtc.create("shortv", layers=(0,), budget=1.0))
    for layer in range(len(case["lc_scores"])):
        scores.append(float(calibrate.divergence(next_token(frozen(layer)), full)))
    torch.testing.assert_close(torch.tensor(scores), case["lc_scores"].float(), atol=1e-6, rtol=1e-4)
    assert sorted(range(len(scores)), key=scores.__getitem__) == case["lc_order"].tolist()


def test_contributions_are_those_of_a_model_whose_layer_leaves_visual_rows_alone():
    """The definition, by hooks of our own: the two updates of a layer are zero on visual rows."""
    llava = tiny("llava")
    batches = [llava.inputs(PROMPTS[:1]), llava.inputs(PROMPTS[1:])]
    scores = calibrate.layer_contributions(llava.model, batches)
    layers = llava.model.model.language_model.layers
    expected = torch.zeros(len(layers), dtype=torch.float64)
    with torch.no_grad():
        for inputs in batches:
            is_visual = (inputs["input_ids"] == llava.placeholder)[..., None]
            full = llava.model(**inputs).logits[:, -1].double().log_softmax(-1)
            for index, layer in enumerate(layers):
                hooks = [
                    layer.self_attn.register_forward_hook(
                        lambda module, args, out, rows=is_visual: (out[0].masked_fill(rows, 0), *out[1:])
                    ),
                    layer.mlp.register_forward_hook(lambda module, args, out, rows=is_visual: out.masked_fill(rows, 0)),
                ]
                changed = llava.model(**inputs).logits[:, -1].double().log_softmax(-1)
                for hook in hooks:
                    hook.remove()
                expected[index] += (changed.exp() * (changed - full)).sum()
    torch.testing.assert_close(torch.tensor(scores).double(), expected / 3, atol=1e-6, rtol=1e-4)
    assert scores[-1] < 1e-9 < scores[0]


def test_prompts_padded_on_the_right_have_no_last_column():
    llava = tiny("llava")
    with pytest.raises(errors.InputError, match="Pad them left"):
        calibrate.layer_contributions(llava.model, [llava.inputs(PROMPTS, padding="right")])


@pytest.fixture(scope="module")
def embedded():
    return load(attention="sdpa")


def test_calibration_of_the_embedded_model_is_stable_and_usable(embedded, tmp_path):
    suite = suites.scenes(1, seed=3, split="val")
    first, again = (calibrate.calibrate("shortv", embedded, suite, size) for size in (8, 3))
    assert first.options == again.options
    assert first.measured["contribution"] == pytest.approx(again.measured["contribution"], rel=1e-2, abs=1e-8)
    path = tmp_path / "layers.json"
    first.write(path)
    assert json.loads(path.read_text()) == asdict(first)
    method = vtc.create("shortv", calibration=str(path), budget=0.5)
    order = first.options["layers"]
    assert order[0] == 7  # the last layer's visual rows reach nobody
    assert frozen_layers(method, 8) == sorted(order[:4])
    assert vtc.parse(vtc.format_spec(method)) == (method,)


def test_the_shipped_calibration_belongs_to_the_embedded_model(embedded):
    inputs = dict(suites_batch(embedded))
    with vtc.compress(embedded.model, "shortv:0.5(calibration=scenes-llava)") as handle, torch.no_grad():
        embedded.model(**inputs)
        report = handle.report
    assert report.per_layer == (report.visual_tokens,) * 8
    assert report.flops < 0.7 * report.flops_dense


def suites_batch(embedded):
    item = suites.scenes(1, seed=1, split="val").items[0]
    return embedded.inputs(item.image, item.question)


def frozen_layers(method, depth):
    return [stage.site.index for stage in method.stages_in(depth)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists(name):
    depth, order = PUBLISHED[name]
    assert len(set(order)) == len(order) == {32: 19, 40: 24}[depth]
    assert max(order) == depth - 1
    whole = vtc.create("shortv", calibration=name)
    assert frozen_layers(whole, depth) == sorted(order)
    half = vtc.create("shortv", calibration=name, budget=0.5)
    assert frozen_layers(half, depth) == sorted(order[: depth // 2])
    with pytest.raises(errors.BudgetError, match=f"freezes {round(0.75 * depth)} of {depth} layers"):
        vtc.create("shortv", calibration=name, budget=0.25).stages_in(depth)


def test_the_list_of_another_depth_is_refused():
    with pytest.raises(errors.SpecError, match="for 32 decoder layers, and this model has 4"):
        vtc.patch(tiny("llava").model, "shortv")


def test_a_token_budget_is_refused():
    with pytest.raises(errors.BudgetError, match="no token leaves"):
        vtc.patch(tiny("llava").model, "shortv@1|3", budget=8)


def test_a_full_ranking_needs_a_budget():
    with pytest.raises(errors.BudgetError, match="names every layer"):
        vtc.create("shortv", calibration="scenes-llava").stages_in(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1)}, "different decoder layers"),
        ({"layers": (-1,)}, "different decoder layers"),
        ({"calibration": "llava-1.5"}, "nor one of: llava-1.5-7b"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("shortv", **options)


@pytest.mark.parametrize("text", ["{}", "no json", '{"method": "shortv", "options": {"layers": [0, 2]}}', "[1]"])
def test_a_file_that_is_no_calibration(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(errors.SpecError, match=r"is no (ranking of layers|calibration of method)"):
        vtc.create("shortv", calibration=str(path))
