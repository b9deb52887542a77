"""DyMU's thresholds, merges, calibration and schedules against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.methods.dymu import SCHEDULES, DyMU, ThresholdFinder, merge_counts
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
STEPS = golden_cases("dymu", FOLDER, kind="dtome_thr")
EDGES = golden_cases("dymu", FOLDER, kind="edge_thr")
CALIBRATION = golden_cases("dymu", FOLDER, kind="calib")


def step(x, metric, sizes, threshold, prefix=1):
    tokens = vtc.Tokens.of(x, 1, num_prefix=prefix, keys=metric[:, None], sizes=sizes)
    return DyMU(thresholds=(threshold,)).stages()[0].decide(tokens)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_golden_thresholded_steps(case):
    x, sizes, total = case["x0"], torch.ones(case["x0"].shape[:2]), None
    for i in range(2):
        token_map = step(x, case[f"s{i}_metric"], sizes, case.number(f"s{i}_threshold"))
        odd = torch.arange(1, x.shape[1], 2)[None]
        assert torch.equal(token_map.anchor, torch.cat([case[f"s{i}_unm_idx"] * 2, odd], dim=1))
        source = case[f"s{i}_src_idx"] * 2
        target = token_map.sources().gather(1, source)
        assert torch.equal(token_map.anchor.gather(1, target), case[f"s{i}_dst_idx"] * 2 + 1)
        torch.testing.assert_close(token_map.apply(x), case[f"s{i}_x"], atol=1e-5, rtol=1e-5)
        total = token_map if total is None else total.then(token_map)
        torch.testing.assert_close(total.sizes(), case[f"s{i}_size"])
        assert torch.equal(total.matrix(mass=True) > 0, case[f"s{i}_pos_tracking"].bool())
        x, sizes = case[f"s{i}_x"], total.sizes()
    patches = total.sources()[:, 1:]  # the mapping that the LLM unmerges by
    assert torch.equal(patches[0] - 1, case["mapping_img"].reshape(-1))


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_golden_thresholds_that_merge_nothing_and_all_they_may(case):
    x = case["x0"]
    ones = torch.ones(x.shape[:2])
    for name, threshold in (("thr1", 1.0), ("thrm1", -1.0)):
        token_map = step(x, x, ones, threshold)
        torch.testing.assert_close(token_map.apply(x), case[f"{name}_x"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(token_map.sizes(), case[f"{name}_size"])


@pytest.mark.parametrize("case", CALIBRATION, ids=str)
def test_golden_calibration(case):
    finder = ThresholdFinder(total=case.number("r"), blocks=1)
    (stage,) = finder.stages()
    for i in range(3):
        metric = case[f"b{i}_metric"]
        tokens = vtc.Tokens.of(metric, 1, num_prefix=1, keys=metric[:, None], sizes=torch.ones(metric.shape[:2]))
        token_map = stage.decide(tokens)
        assert list(token_map.lengths) == case[f"b{i}_ntok"].tolist()
        assert finder.seen[0][-1] == pytest.approx(case.number(f"b{i}_batch_threshold"), abs=1e-6)
        assert finder.thresholds[0] == pytest.approx(case.number(f"b{i}_running_threshold"), abs=1e-6)
        if i == 0:
            for b, n in enumerate(token_map.lengths):
                ours, theirs = token_map.sizes()[b, :n].sort().values, case["b0_size"][b, :n].sort().values
                torch.testing.assert_close(ours, theirs)
    for j in range(2):  # inference on single images of the first batch, with what was found
        metric = case["b0_metric"][j : j + 1]
        token_map = step(metric, metric, torch.ones(metric.shape[:2]), finder.thresholds[0])
        torch.testing.assert_close(token_map.sizes(), case[f"inf{j}_size"])
        assert torch.equal(token_map.matrix(mass=True) > 0, case[f"inf{j}_pos_tracking"].bool())


@pytest.mark.parametrize("case", golden_cases("dymu", FOLDER, kind="schedule"), ids=str)
def test_golden_schedules(case):
    for i, (blocks, total, kind) in enumerate(case["cases"].tolist()):
        assert merge_counts(total, blocks, SCHEDULES[kind]) == case[f"r{i}"].tolist()


def test_thresholds_decide_alone():
    with pytest.raises(errors.SpecError, match="the thresholds decide"):
        vtc.create("dymu", thresholds=(0.9,), budget=8)
    with pytest.raises(errors.SpecError, match="cosines"):
        vtc.create("dymu", thresholds=(1.5,))


def test_a_budget_far_below_half_per_block_is_met():
    """The last block can only halve, so the ones before it merge more."""
    stays = [vtc.create("dymu").pace(576, 32, step, 5) for step in range(5)]
    assert stays == [467, 256, 128, 64, 32]


def test_a_budget_for_all_is_not_meant_for_thresholds():
    merged, cut = vtc.parse("dymu(thresholds=0.9|0.8) + fastv@2", budget=64)
    assert merged.budget is None
    assert cut.budget == vtc.Budget(tokens=64)


@pytest.mark.parametrize("spec", ["dymu:7", "dymu(thresholds=0.5|0.3)"])
def test_unmerging_in_the_llm(sdpa_llava, spec):
    """Patched as published, the LLM attends over every place, and the cache holds them all."""
    inputs = sdpa_llava.inputs()
    with vtc.compress(sdpa_llava.model, spec) as handle, torch.no_grad():
        cache = names.cache_of(sdpa_llava.model(**inputs, use_cache=True))
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert all(entering < 16 * image for entering, image in zip(handle.report.entering, (1, 2, 1), strict=False))
    assert handle.report.kv_bytes == handle.report.kv_bytes_dense
    assert torch.equal(handle.report.token_map.sizes().sum(1), torch.full((len(handle.report.samples),), 16.0))
