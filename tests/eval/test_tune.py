"""Which cell `vtc tune` takes, what it prints, and when it refuses."""

import json
import subprocess
import sys

import pytest

import vtc
from vtc.eval.bench.tune import Goal, choose
from vtc.eval.results import file as results


def cell(right, ttft, questions=100, **other):
    """A finished cell with `right` of 100 answers and a time to first token; dense takes 100 ms in its turns."""
    entry = {
        "batch": 1,
        "phases": {"ttft_ms": {"median": ttft}, "encoder_ms": {"median": 10.0}},
        "dense_ttft_ms": {"median": 100.0},
        "flops": {"tower": 10, "projector": 1, "llm": int(ttft)},
        "kv_bytes": 5,
        "peak_bytes": None,
    }
    accuracy = {"accuracy": right / questions, "right": right, "questions": questions}
    correct = "1" * right + "0" * (questions - right)
    return {"kind": "method", "accuracy": {"overall": accuracy}, "correct": correct, "latency": [entry], **other}


@pytest.fixture
def result():
    cells = {
        "dense": cell(90, 100.0, kind="dense"),
        "ideal:64": {"kind": "ideal", "latency": cell(0, 20.0)["latency"]},
        "random:64": cell(60, 30.0, kind="control", spec="random:64", budget=64, method="random"),
        "good:64": cell(89, 50.0, spec="good:64", budget=64, method="good", kv_bytes=7),
        "good:32": cell(85, 40.0, spec="good:32", budget=32, method="good", kv_bytes=3),
        "slow:64": cell(90, 70.0, spec="slow:64", budget=64, method="slow", kv_bytes=6),
        "refused:64": {"kind": "method", "refused": "no signal"},
    }
    return results.complete({"run": {"model": "m", "batches": [1], "positions": "auto"}, "cells": cells})


@pytest.mark.parametrize(
    ("target", "minimize", "chosen"),
    [
        ("accuracy>=0.98", "ttft", "good:64"),
        ("accuracy>=98%", "ttft", "good:64"),
        ("accuracy>=1", "ttft", "slow:64"),
        ("accuracy>=0.9", "ttft", "good:32"),
        ("accuracy>=0", "ttft", "random:64"),
        ("accuracy>=0.98", "kv", "slow:64"),
        ("accuracy>=0.9,speed_up<=2.2", "ttft", "good:64"),
        ("absolute_accuracy>=0.9", "ttft", "slow:64"),
    ],
)
def test_the_cheapest_cell_that_satisfies_the_target(result, target, minimize, chosen):
    assert choose(result, Goal.of(target, minimize)).name == chosen


def test_times_are_put_on_the_scale_of_the_dense_cell(result):
    """A machine that was twice as slow while a cell ran changes nothing."""
    entry = result["cells"]["good:64"]["latency"][0]
    entry["phases"]["ttft_ms"]["median"], entry["dense_ttft_ms"]["median"] = 100.0, 200.0
    choice = choose(results.complete(result), Goal.of("accuracy>=0.98", "ttft"))
    assert choice.name == "good:64"
    assert choice.metrics["ttft"] == 50.0


def test_the_lower_end_of_the_interval_can_be_asked_for(result):
    choice = choose(result, Goal.of("accuracy_low>=0.99", "ttft"))
    assert choice.name == "slow:64"  # equal to dense in every answer
    low = result["cells"]["good:64"]["against"]["dense"]["low"]
    assert low < 0
    with pytest.raises(vtc.VTCError, match="none of 4 cells"):
        choose(result, Goal.of("accuracy_low>=1.01", "ttft"))


def test_the_line_can_be_run(result):
    choice = choose(result, Goal.of("accuracy>=0.98", "ttft"))
    assert choice.line == 'handle = vtc.patch(model, "good:64")'
    assert "ttft 50 (dense: 100)" in choice.summary()
    result["run"]["positions"] = "original"
    assert choose(result, Goal.of("accuracy>=0.98", "ttft")).line.endswith(', positions="original")')


def test_nothing_satisfies_the_target(result):
    with pytest.raises(vtc.VTCError, match="slow:64 comes nearest with 1"):
        choose(result, Goal.of("accuracy>=1.5", "ttft"))


@pytest.mark.parametrize(
    ("target", "minimize", "message"),
    [
        ("accuracy", "ttft", "metric>=number"),
        ("accuracy>0.9", "ttft", "metric>=number"),
        ("accuracy>=.", "ttft", "metric>=number"),
        ("acuracy>=0.9", "ttft", "Did you mean 'accuracy'"),
        ("accuracy>=0.9", "tft", "Did you mean 'ttft'"),
        ("accuracy>=0.9", "memory", "no cell of this result has 'memory'"),
    ],
)
def test_goals_that_make_no_sense(result, target, minimize, message):
    with pytest.raises(vtc.VTCError, match=message):
        choose(result, Goal.of(target, minimize))


def test_the_command_reads_a_result_file(result, tmp_path):
    path = tmp_path / "r.json"
    results.write(result, path)
    run = [sys.executable, "-m", "vtc", "tune", "--no-run", "--out", str(path)]
    done = subprocess.run([*run, "--json"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["cell"] == "good:64"
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == 'handle = vtc.patch(model, "good:64")'
    done = subprocess.run([*run, "--target", "accuracy>=2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "comes nearest" in done.stderr


def test_the_command_runs_what_is_missing(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    path = tmp_path / "r.json"
    run = [sys.executable, "-m", "vtc", "tune", "--methods", "uniform", "--budgets", "192", "--per-category", "1"]
    done = subprocess.run(
        [*run, "--target", "accuracy>=0.5", "--out", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'handle = vtc.patch(model, "uniform:192")'
    assert set(results.read(path)["cells"]) == {"dense", "uniform:192"}
