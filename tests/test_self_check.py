"""The self check passes here, and it does not where a host is decoded wrongly."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vtc.eval.cli.doctor  # noqa: F401 (adds `vtc doctor`)
from vtc.cli import app
from vtc.engine.host import contract
from vtc.engine.llm import exit, layers, logical
from vtc.errors import UnsupportedModelError
from vtc.testing import self_check
from vtc.testing.self_check import CASES


def failed(check):
    return {one.case for one in check.compared if not one.difference <= check.limit}


def test_it_passes_here():
    check = self_check("llava")
    assert check.passed
    assert check.tested
    assert {(one.family, one.case, one.attention) for one in check.compared} == {
        ("llava", case, attention) for case in CASES for attention in ("sdpa", "eager")
    }
    assert all(0 < one.difference < 1e-5 for one in check.compared)
    assert check.versions["torch"] == torch.__version__
    assert len(check.worst()) == len(CASES)
    assert json.loads(json.dumps(check.to_dict()))["passed"]


def test_a_cache_that_is_not_remembered(monkeypatch):
    """What transformers 5.24 did to the first version: nothing was noted on the cache."""
    monkeypatch.setattr(exit, "remember", lambda cache, memory: None)
    assert failed(self_check("llava", ("sdpa",))) == set(CASES)


@pytest.mark.parametrize(
    ("module", "name", "wrong", "cases"),
    [
        (logical, "_logical_length", lambda cache, layer_idx=0: 3, {"second turn"}),
        (logical, "_mask_sizes", lambda cache, query_length, layer_idx=0: (2, 0), {"decode steps, ragged batch"}),
        (layers, "_arguments", lambda *_: {}, {"stage in the LLM"}),
    ],
)
def test_what_a_changed_host_would_do(monkeypatch, module, name, wrong, cases):
    monkeypatch.setattr(module, name, wrong)
    assert cases <= failed(self_check("llava", ("eager",)))


def test_an_unknown_family():
    with pytest.raises(UnsupportedModelError, match=r"no family llama\. Families: gemma3"):
        self_check("llama")


def test_it_tries_versions_that_the_patch_refuses(monkeypatch):
    monkeypatch.setattr(contract, "installed", lambda: "5.99.0")
    check = self_check("llava", ("sdpa",))
    assert check.passed
    assert not check.tested
    assert not contract.is_untested_allowed()
    shown = CliRunner().invoke(app, ["doctor", "--self-check", "llava"])
    assert shown.exit_code == 0
    assert "transformers 5.99.0" in shown.output
    assert "VTC_UNTESTED_HOST=1" in shown.output


class TestCommand:
    def test_it_prints_versions_and_cases(self):
        shown = CliRunner().invoke(app, ["doctor", "--self-check", "llava"])
        assert shown.exit_code == 0
        assert f"torch {torch.__version__}" in shown.output
        assert "second turn" in shown.output
        assert "passed" in shown.output

    def test_a_failure_is_an_exit_code(self, monkeypatch):
        monkeypatch.setattr(exit, "remember", lambda cache, memory: None)
        shown = CliRunner().invoke(app, ["doctor", "llava", "--self-check"])
        assert shown.exit_code == 1
        assert "failed" in shown.output
        data = json.loads(CliRunner().invoke(app, ["doctor", "llava", "--self-check", "--json"]).output)
        assert not data["passed"]
        assert data["limit"] == 1e-5
        assert all(one["error"] and one["difference"] is None for one in data["compared"])
