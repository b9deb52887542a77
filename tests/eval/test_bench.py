"""`vtc bench` as a user calls it: cells, resuming after a kill, refusals, tables, pictures."""

import json
import signal
import subprocess
import sys
import time

import pytest

import vtc
from vtc.adapter import adapter_for
from vtc.eval.bench import cells as bench
from vtc.eval.bench.cells import Plan, Settings
from vtc.eval.bench.subject import Subject
from vtc.eval.cli._options import specs
from vtc.eval.results import file as results
from vtc.testing import tiny

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
RUN = [sys.executable, "-m", "vtc", "bench"]
#: what a second run may change
CLOCKS = ("seconds", "latency")


def call(*arguments, cwd=None):
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def without_clocks(cells):
    return {name: {k: v for k, v in cell.items() if k not in CLOCKS} for name, cell in cells.items()}


def test_a_killed_run_goes_on_and_ends_with_the_same_result(tmp_path):
    options = (
        "--methods", "random,visionzip,fastv@2", "--budgets", "64,32", "--per-category", "1",
        "--no-controls", "--no-latency", "--json",
    )  # fmt: skip
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    process = subprocess.Popen(
        [*RUN, *options, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (killed.exists() and len(results.read(killed)["cells"]) >= 3):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read(killed)["cells"]
    done = call(*options, "--out", str(whole))
    assert done.returncode == 0, done.stderr
    assert 3 <= len(before) < len(json.loads(done.stdout)["cells"])
    again = call(*options, "--out", str(killed))
    assert again.returncode == 0, again.stderr
    after = json.loads(again.stdout)
    # finished cells were not run again: their clocks say the same
    assert all(after["cells"][name]["seconds"] == cell["seconds"] for name, cell in before.items())
    expected = json.loads(done.stdout)
    assert without_clocks(after["cells"]) == without_clocks(expected["cells"])
    assert list(after["cells"]) == list(expected["cells"])
    assert after["run"] == expected["run"]
    assert results.read(killed) == after


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run with everything, and its file."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "bench.json"
    options = ("--methods", "visionzip,cdpruner", "--budgets", "64", "--per-category", "1", "--repeats", "2")
    done = call(*options, "--new-tokens", "2", "--batches", "1,2", "--plots", "--out", str(out), cwd=folder)
    assert done.returncode == 0, done.stderr
    return out, done


def test_every_cell_beside_its_references(measured):
    out, _ = measured
    result = results.read(out)
    cells = result["cells"]
    controls = [slug for slug in vtc.methods() if vtc.describe(slug)["fidelity"] == "control"]
    assert set(cells) == {"dense", "ideal:64", "visionzip:64", "cdpruner:64", *(f"{slug}:64" for slug in controls)}
    cell = cells["visionzip:64"]
    assert cell["tokens"] == {"before": 576, "entering_llm": 64, "after_last_cut": 64, "layer_average": 64}
    assert cell["accuracy"]["overall"]["questions"] == len(cell["correct"]) == len(cell["answers"]) == 8
    assert cell["accuracy"]["overall"]["right"] == cell["correct"].count("1")
    low, high = cell["accuracy"]["overall"]["wilson95"]
    assert 0 <= low <= cell["accuracy"]["overall"]["accuracy"] <= high <= 1
    assert set(cell["against"]) == {"dense", "random"}
    dense = cells["dense"]
    lost = sum(a == "1" and b == "0" for a, b in zip(dense["correct"], cell["correct"], strict=True))
    assert cell["against"]["dense"]["lost"] == lost
    same = sum(a == b for a, b in zip(dense["answers"], cell["answers"], strict=True))
    assert cell["agreement_with_dense"] == round(same / 8, 4)
    assert [entry["batch"] for entry in cell["latency"]] == [1, 2]
    assert {"commit", "date", "processor", "device", "packages"} <= set(result["environment"])
    assert result["run"]["suite"]["seed"] == 0


def test_times_and_flops_of_a_cell(measured):
    cells = results.read(measured[0])["cells"]
    for name in ("dense", "ideal:64", "visionzip:64"):
        for entry in cells[name]["latency"]:
            assert entry["phases"]["ttft_ms"]["runs"] == len(entry["samples"]["ttft_ms"]) == 2
            assert 0 < entry["encoder_share"] < 1
            assert entry["peak_bytes"] is None or entry["peak_bytes"] > 0
    dense, ideal, method = (cells[name]["latency"][0] for name in ("dense", "ideal:64", "visionzip:64"))
    total = [sum(entry["flops"].values()) for entry in (dense, method)]
    assert method["predicted_speed_up"] == round(total[0] / total[1], 4)
    assert method["realised"] == pytest.approx(method["speed_up"] / method["predicted_speed_up"], abs=1e-3)
    # VisionZip's projector works on full grids; what enters the LLM is what the ideal gets
    assert ideal["flops"]["llm"] == method["flops"]["llm"] < dense["flops"]["llm"]
    assert ideal["kv_bytes"] == method["kv_bytes"] < dense["kv_bytes"]
    assert ideal["flops"]["tower"] == method["flops"]["tower"] == dense["flops"]["tower"]
    # FLOPs are per sample, so the batch does not change them
    assert cells["dense"]["latency"][1]["flops"] == dense["flops"]


def test_a_refused_method_is_a_row_with_its_reason(measured):
    out, done = measured
    assert "clip_image_embeds" in results.read(out)["cells"]["cdpruner:64"]["refused"]
    assert "Methods that did not run" in done.stdout
    assert "cdpruner" in done.stdout


def test_pictures(measured):
    from PIL import Image

    out, _ = measured
    for axis in ("tokens", "ttft"):
        with Image.open(out.with_name(f"bench-{axis}.png")) as picture:
            assert picture.size[0] >= 1200
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # not an empty page
    page = out.with_suffix(".html").read_text()
    assert "visionzip 64" in page
    assert 'src="http' not in page  # needs no network


def test_the_same_file_for_another_run_is_refused(measured):
    out, _ = measured
    done = call("--methods", "visionzip", "--per-category", "3", "--out", str(out))
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert "--fresh" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "visionzap"], "Did you mean 'visionzip'"),
        (["--budgets", "0"], "at least 1"),
        (["--batches", "x"], "--batches"),
        (["--arch", "llava-9"], "architecture"),
        (["--arch", "llava-1.5-7b", "--model", "x"], "random weights"),
        (["--data", "none.jsonl"], "no file of questions"),
        (["compare", "a.json", "b.json"], "no result file"),
        (["report", "a.json"], "no result file"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())


def test_own_questions(tmp_path):
    from vtc.eval.scenes.draw import draw_scene, questions

    scene = draw_scene(3)
    scene.image.save(tmp_path / "a.png")
    import random

    asked = questions(scene, random.Random(0))[:2]
    rows = [{"image": "a.png", "question": q.prompt, "answer": q.answer, "category": q.category} for q in asked]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = call(
        "--data", "own.jsonl", "--methods", "uniform", "--budgets", "0.5", "--no-controls", "--no-latency", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["cells"]) == {"dense", "uniform:0.5"}
    assert result["cells"]["dense"]["accuracy"]["overall"]["questions"] == 2
    assert result["cells"]["uniform:0.5"]["tokens"]["entering_llm"] == 288


def subject():
    built = tiny("llava")
    return Subject(
        "tiny", adapter_for(built.model), lambda batch: built.inputs([(3, "image", 5)] * batch), None, {"suite": None}
    )


def test_a_broken_method_costs_no_other_cell(monkeypatch, capsys):
    from vtc.methods.uniform import Uniform

    def broken(self):
        raise RuntimeError("a bug")

    settings = Settings(runs=1, new_tokens=1)
    cells = [Plan("dense", "dense"), Plan("uniform:4", "control", "uniform", 4), Plan("pool:4", "control", "pool", 4)]
    monkeypatch.setattr(Uniform, "stages", broken)
    result = bench.bench(subject(), cells, settings)
    assert "RuntimeError: a bug" in result["cells"]["uniform:4"]["failed"]
    assert "latency" in result["cells"]["pool:4"]
    assert set(bench.failures(result)) == {"uniform:4"}
    assert "a bug" in capsys.readouterr().err  # with its traceback


def test_times_alone(tmp_path):
    """Without questions a cell still has tokens, FLOPs and times; nothing is left on the model."""
    found = subject()
    model = found.adapter.model
    cells = bench.plans(["uniform"], [4], with_controls=False)
    result = bench.bench(found, cells, Settings(runs=1, new_tokens=1, batches=(1, 2)), tmp_path / "x.json")
    assert list(result["cells"]) == ["dense", "ideal:4", "uniform:4"]
    for name, entering in (("dense", 16), ("ideal:4", 4), ("uniform:4", 4)):
        assert result["cells"][name]["tokens"]["entering_llm"] == entering
        assert [entry["batch"] for entry in result["cells"][name]["latency"]] == [1, 2]
    assert not any("accuracy" in cell for cell in result["cells"].values())
    assert results.read(tmp_path / "x.json") == json.loads(results.dumps(result))
    vtc.patch(model, "uniform:4").remove()  # would raise if a patch were left


def test_specs_with_their_own_budget_are_one_cell():
    found = bench.plans(["fastervlm:128 + dart@2:64", "dart@2"], [64, 32], with_controls=False, with_ideal=False)
    assert [plan.name for plan in found] == ["dense", "fastervlm:128 + dart@2:64", "dart@2:64", "dart@2:32"]


def test_all_means_every_registered_image_method():
    known = {slug for slug in vtc.methods() if "video" not in vtc.describe(slug)["tags"]}
    assert set(bench.image_methods()) == known
    assert set(bench.controls()) <= known


def test_commas_inside_parentheses_belong_to_a_spec():
    assert specs("a(x=1, y=(2, 3)), b@2:64,, c") == ["a(x=1, y=(2, 3))", "b@2:64", "c"]
