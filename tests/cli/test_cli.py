"""The command line, as a user would call it."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import vtc
from vtc.signals import SIGNALS

RUN = [sys.executable, "-m", "vtc"]


def call(*arguments, cwd=None):
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_methods_as_json():
    done = call("methods", "--json")
    rows = json.loads(done.stdout)
    assert [row["method"] for row in rows] == list(vtc.methods())
    assert {row["fidelity"] for row in rows} <= {"golden", "paper", "reconstructed", "control"}
    # the command prints what the function returns, families included
    assert rows == json.loads(json.dumps([vtc.describe(slug, families=True) for slug in vtc.methods()]))


def test_signals_as_json():
    rows = json.loads(call("signals", "--json").stdout)
    assert [row["signal"] for row in rows] == list(SIGNALS)
    (entry,) = [row for row in rows if row["signal"] == "tile"]
    assert (entry["shape"], entry["dtype"], entry["sites"]) == ("B 4", "int64", ["tower_out"])


def test_models_as_json():
    rows = json.loads(call("models", "--json").stdout)
    assert "llava" in [row["family"] for row in rows]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(path)
    return path


def test_run_on_a_photograph_prints_json_and_draws(photograph, tmp_path):
    done = call(
        "run", "--image", str(photograph), "--question", "how many circles are there?", "--method", "visionzip",
        "--budget", "64", "--json", "--overlay", str(tmp_path / "o.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["tokens"]["before"] == 576
    assert data["tokens"]["entering_llm"] == data["tokens"]["after_last_cut"] == data["tokens"]["layer_average"] == 64
    # prefill FLOPs shrink in proportion to the tokens, a little more for the quadratic part
    share = data["flops"]["llm_prefill"] / data["flops"]["llm_prefill_dense"]
    tokens = (64 + data["tokens"]["text"]) / (576 + data["tokens"]["text"])
    assert 0.5 * tokens < share <= tokens
    assert data["kv_bytes"]["compressed"] / data["kv_bytes"]["dense"] == pytest.approx(tokens)
    assert set(data["ttft_ms"]) == {"dense", "compressed"}
    assert all(timing["runs"] == 7 for timing in data["ttft_ms"].values())
    assert data["selection_ms"] > 0
    assert isinstance(data["answer"], str)
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size[0] > 1000


def test_run_without_arguments_draws_a_scene(tmp_path):
    done = call("run", "--repeats", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "true answer" in done.stdout
    assert (tmp_path / "vtc-overlay.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "visionzap"], "Did you mean 'visionzip'"),
        (["--budget", "0"], "at least 1"),
        (["--budget", "many"], "not a number"),
        (["--image", "missing.png"], "no image at"),
        (["--model", "/nowhere/at/all"], "cannot load"),
        (["--positions", "left"], "'original'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = call("run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert done.stdout == ""


def test_an_image_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    done = call("run", "--image", str(path), cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be decoded" in done.stderr


def test_doctor_on_the_embedded_model():
    found = json.loads(call("doctor", "--json").stdout)
    assert found["family"] == "llava"
    assert {"visionzip", "fastv", "divprune"} <= set(found["runs"])
    assert set(found["runs"]) | set(found["refused"]) == set(vtc.methods())
    assert all(reason.strip() for reason in found["refused"].values())


def test_doctor_on_something_else(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = call("doctor", str(tmp_path))
    assert done.returncode == 2
    assert "bert" in done.stderr
