"""Time of decisions alone, on drawn tokens."""

import dataclasses
import json

import pytest
import torch

import vtc
from vtc.eval.bench import decisions
from vtc.eval.bench.cells import image_methods
from vtc.testing.conformance import AXES

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Two tiles of 6 x 6 in place of the real sizes, and a narrow decoder."""
    monkeypatch.setattr(decisions, "SIDE", 6)
    monkeypatch.setattr(decisions, "SIZES", {36: 1, 72: 2})
    monkeypatch.setattr(decisions, "AXES", AXES)
    narrow = dataclasses.replace(decisions.VICUNA_7B, width=64, mlp=96, heads=2, key_heads=2, head=32)
    monkeypatch.setattr(decisions, "VICUNA_7B", narrow)


@pytest.mark.parametrize("spec", image_methods())
def test_every_method_can_be_timed_alone(small, spec):
    row = decisions.row(spec, {str(n): {"median": 2.0} for n in decisions.SIZES}, CPU)
    if "refused" in row:
        assert row["refused"]
        return
    assert set(row) == {"36", "72"}, row
    assert all(cell["share"] == pytest.approx(cell["median"] / 2.0) and cell["median"] > 0 for cell in row.values())


def test_methods_that_need_nothing_are_not_refused(small):
    for spec in ("random", "uniform", "divprune"):
        assert "refused" not in decisions.row(spec, {str(n): {"median": 2.0} for n in decisions.SIZES}, CPU)


def test_the_reference_grows_with_the_tokens(small):
    short, long = (decisions.dense_prefill(n, CPU).median for n in (8, 2000))
    assert 0 < short < long


def test_rows_are_kept_and_written(small, tmp_path):
    path = tmp_path / "r.json"
    result = {"cells": {}}
    decisions.add(result, ["random"], CPU, path)
    first = json.loads(path.read_text())["selection"]
    assert set(first) == {decisions.REFERENCE, "random"}
    decisions.add(result, ["random", "uniform"], CPU, path)
    again = json.loads(path.read_text())["selection"]
    assert {name: again[name] for name in first} == first
    assert set(again) == {*first, "uniform"}


def test_a_method_that_is_refused_says_why(small, monkeypatch):
    def refuse(self):
        raise vtc.VTCError("not here")

    monkeypatch.setattr(vtc.catalogue.registry.method_class("uniform"), "stages", refuse)
    row = decisions.row("uniform", {}, CPU)
    assert row == {"refused": "not here"}
    assert decisions.in_words(row) == "refused: not here"
