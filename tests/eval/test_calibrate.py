"""`vtc calibrate`: what it writes, and what it refuses before it measures."""

import json

import pytest
from typer.testing import CliRunner

import vtc
import vtc.eval.cli.calibrate
from vtc import errors
from vtc.cli import app
from vtc.eval.data import suites
from vtc.eval.probe import calibrate
from vtc.loading import load


def call(*arguments):
    return CliRunner().invoke(app, ["calibrate", *arguments], catch_exceptions=True)


def test_the_command_writes_options_that_the_method_takes(tmp_path):
    out = tmp_path / "layers.json"
    done = call("shortv", "--out", str(out), "--per-category", "1", "--seed", "5", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert json.loads(done.stdout) == data
    assert (data["version"], data["method"], data["model"]) == (1, "shortv", "scenes-llava")
    assert data["suite"]["split"] == "val"
    assert data["suite"]["seed"] == 5
    method = vtc.create(data["method"], layers=tuple(data["options"]["layers"]), budget=0.75)
    scores = data["measured"]["contribution"]
    frozen = [stage.site.index for stage in method.stages_in(8)]
    assert sorted(frozen) == sorted(sorted(range(8), key=scores.__getitem__)[:2])


def test_own_questions(tmp_path):
    item = suites.scenes(1, seed=0, split="val").items[0]
    item.image.save(tmp_path / "a.png")
    row = {"image": "a.png", "question": item.question, "answer": item.answers[0]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    done = call("shortv", "--out", str(tmp_path / "o.json"), "--data", str(tmp_path / "q.jsonl"))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "o.json").read_text())["suite"]["name"] == "q.jsonl"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("shortvv", "--out", "o.json"), errors.SpecError, "Did you mean 'shortv'"),
        (("shortv", "--out", "no/such/folder/o.json"), errors.InputError, "there is no folder"),
        (("shortv", "--out", "o.json", "--data", "none.jsonl"), errors.InputError, "no file of questions"),
    ],
)
def test_refused_before_anything_is_measured(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vtc.loading, "load", lambda *_: pytest.fail("the model was loaded"))
    done = call(*arguments)
    assert isinstance(done.exception, error)
    assert message in str(done.exception)
    assert not (tmp_path / "o.json").exists()


def test_no_samples():
    with pytest.raises(errors.InputError, match="at least one sample"):
        calibrate.layer_contributions(load().model, [])


def test_thresholds_of_dymu_keep_so_many_tokens_on_average(tmp_path):
    """The finder's own images keep the number that was asked for; scenes of another seed come near it."""
    out = tmp_path / "dymu.json"
    done = call("dymu", "--keep", "150", "--out", str(out), "--per-category", "2", "--batch-size", "16", "--json")
    assert done.exit_code == 0, done.output
    thresholds = json.loads(out.read_text())["options"]["thresholds"]
    assert all(0 <= value <= 1 for value in thresholds)
    loaded = load()
    items = suites.scenes(1, seed=3, split="val").items
    left = []
    with vtc.compress(loaded.model, f"dymu(calibration={out})", unmerge=False) as handle:
        for item in items:
            loaded.model(**loaded.inputs(item.image, item.question))
            left += handle.report.entering
    assert len(set(left)) > 1, "the count follows the image"
    assert 75 < sum(left) / len(left) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("dymu",), "--keep 64"), (("dymu", "--keep", "576"), "between 1 and 575"), (("shortv", "--keep", "5"), "dymu")],
)
def test_keep_belongs_to_dymu(arguments, message, tmp_path):
    done = call(*arguments, "--out", str(tmp_path / "o.json"), "--per-category", "1")
    assert isinstance(done.exception, errors.InputError)
    assert message in str(done.exception)
