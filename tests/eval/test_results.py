"""Result files, comparisons of two of them, and the pages made from them."""

import json
from pathlib import Path

import pytest

import vtc
from vtc.eval.results import file as results
from vtc.eval.results import page as pages
from vtc.eval.results import plots
from vtc.eval.results.compare import compare


def share(right, questions):
    return {"accuracy": right / questions, "right": right, "questions": questions, "wilson95": [0.1, 0.9]}


def cell(correct, ttft=None, **other):
    found = {
        "kind": "method",
        "accuracy": {"overall": share(correct.count("1"), len(correct))},
        "correct": correct,
        "answers": list(correct),
        "tokens": {"before": 16, "entering_llm": 4, "after_last_cut": 4, "layer_average": 4},
        **other,
    }
    if ttft is not None:
        found["latency"] = [
            {
                "batch": 1,
                "phases": {
                    "ttft_ms": {"median": sorted(ttft)[1], "p20": 1.0, "p80": 2.0},
                    "encoder_ms": {"median": 1.0},
                },
                "samples": {"ttft_ms": ttft},
                "dense_ttft_ms": {"median": 20.0},
                "flops": {"tower": 10, "projector": 0, "llm": 10},
                "kv_bytes": 1,
                "peak_bytes": None,
            }
        ]
    return found


def result(**cells):
    run = {"model": "m", "suite": {"name": "s"}, "batches": [1], "positions": "auto"}
    environment = {"packages": {"torch": "2"}, "device": "cpu", "threads": 1}
    named = {name.replace("_", ":"): value for name, value in cells.items()}
    return results.complete({"schema": 2, "run": run, "environment": environment, "cells": named})


def test_files_are_read_as_they_were_written(tmp_path):
    found = result(dense=cell("11"), a_4=cell("10"))
    results.write(found, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == found
    assert sum('"correct"' in line for line in (tmp_path / "r.json").read_text().splitlines()) == 2  # a line per cell
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cells": []}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(vtc.VTCError, match=r"r\.json"):
        results.read(tmp_path / "r.json")


def test_what_follows_from_the_cells():
    found = result(
        dense=cell("1111", [20.0, 20.0, 20.0], kind="dense"),
        random_4=cell("1000", [10.0, 10.0, 10.0]),
        a_4=cell("1101", [5.0, 5.0, 5.0]),
        b_8=cell("1100"),
    )
    a = found["cells"]["a:4"]
    assert (a["against"]["dense"]["lost"], a["against"]["dense"]["won"]) == (1, 0)
    assert (a["against"]["random"]["lost"], a["against"]["random"]["won"]) == (0, 2)
    assert a["agreement_with_dense"] == 0.75
    assert a["latency"][0]["speed_up"] == 4.0
    assert a["latency"][0]["predicted_speed_up"] == 1.0
    assert set(found["cells"]["random:4"]["against"]) == {"dense"}
    assert set(found["cells"]["b:8"]["against"]) == {"dense"}  # random was not run at 8 tokens
    assert json.loads(json.dumps(found)) == results.complete(json.loads(json.dumps(found)))


def test_the_same_questions_are_compared_one_by_one():
    first = result(dense=cell("1111"), a_4=cell("1100", [10.0, 10.0, 10.0]))
    second = result(dense=cell("1111"), a_4=cell("0111", [4.0, 4.0, 4.0]), b_4=cell("1111"))
    rows = {row["cell"]: row for row in compare(first, second)}
    assert set(rows) == {"dense", "a:4"}
    accuracy = rows["a:4"]["accuracy"]
    assert (accuracy["lost"], accuracy["won"], accuracy["difference"]) == (1, 2, 0.25)
    assert accuracy["low"] <= 0.25 <= accuracy["high"]
    assert accuracy["p"] == 1.0
    assert rows["a:4"]["ttft_ms"] == {"first": 10.0, "second": 4.0, "difference": -6.0, "low": -6.0, "high": -6.0}
    assert rows["dense"]["accuracy"]["difference"] == 0


def test_other_questions_are_compared_as_shares():
    first, second = result(a_4=cell("1100")), result(a_4=cell("0111"))
    second["run"]["suite"] = {"name": "t"}
    accuracy = compare(first, second)[0]["accuracy"]
    assert accuracy["p"] is None
    assert accuracy["low"] < accuracy["difference"] == 0.25 < accuracy["high"]


def test_results_without_a_common_cell():
    with pytest.raises(vtc.VTCError, match="no cell in common"):
        compare(result(a_4=cell("1")), result(b_4=cell("1")))


def test_the_front_holds_what_nothing_beats():
    found = [
        plots.Point(name, "4", kind, float(x), float(y), float(y), float(y))
        for name, kind, x, y in (
            ("dense", "dense", 1, 100),
            ("cheap", "method", 1, 50),
            ("worse", "method", 2, 50),
            ("good", "method", 3, 90),
            ("equal but dearer", "method", 4, 90),
            ("best", "method", 5, 95),
        )
    ]
    assert [point.method for point in plots.front(found)] == ["cheap", "good", "best"]


def test_the_page_tells_the_numbers_of_the_file(tmp_path):
    found = result(
        dense=cell("1111", [20.0, 20.0, 20.0], kind="dense"),
        random_4=cell("1000", [10.0, 10.0, 10.0], kind="control"),
        a_4=cell("1101", [5.0, 5.0, 5.0]),
    )
    found["cells"]["b:4"] = {"kind": "method", "refused": "no | signal"}
    results.write(found, tmp_path / "r.json")
    page = pages.page([tmp_path / "r.json"])
    assert "| `a` | 75.0 % (10-90) |" in page
    assert "-25.0 (" in page
    assert "4.00x | 400%" in page
    assert "| `b` | no \\| signal |" in page
    assert page == pages.page([tmp_path / "r.json"])


def test_the_committed_run_can_be_drawn(tmp_path):
    """It holds every kind of cell: refused ones, and methods whose own thresholds decide how many tokens stay."""
    stored = results.read(Path(__file__).parents[2] / "benchmarks" / "bench-scenes.json")
    assert any(
        results.budget_of(name, cell) == "" for name, cell in stored["cells"].items() if cell["kind"] == "method"
    )
    drawn = plots.draw(stored, tmp_path / "r.json")
    assert drawn and all(path.stat().st_size > 10_000 for path in drawn)


def test_runs_without_questions_have_no_pictures(tmp_path):
    found = result(dense={"kind": "dense"})
    with pytest.raises(vtc.VTCError, match="nothing to draw"):
        plots.draw(found, tmp_path / "r.json")


@pytest.mark.parametrize(
    "typed", ["Result", "Run", "Cell", "Tokens", "Latency", "Task", "Share", "Difference", "Quantiles"]
)
def test_the_page_of_the_format_names_every_entry(typed):
    page = (Path(__file__).parents[2] / "docs" / "results-format.md").read_text()
    missing = [key for key in getattr(results, typed).__annotations__ if f"`{key}`" not in page]
    assert not missing
