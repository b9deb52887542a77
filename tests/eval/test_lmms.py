"""lmms-eval's real command line and `vtc eval`, offline, on the embedded model; each run is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtc.eval.lmms.evaluate import TASKS
from vtc.eval.results.compare import compare
from vtc.eval.results.file import read
from vtc.extras import available

NEEDED = ("lmms_eval", "decord", "sklearn", "skimage")
MISSING = [name for name in NEEDED if not available(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'vtc-toolkit[eval]'"
)
FEW = ("--limit", "3", "--device", "cpu")
TWO = ("--tasks", "vtc_scenes_colour,vtc_scenes_count")
#: a method whose decision raises, and then the real command line
RAISING = """
import runpy, sys
from vtc.catalogue.registry import method_class
def fail(self, tokens):
    raise RuntimeError("boom in our hook")
method_class("fastervlm").filter = fail
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="module")
def call(environment):
    def run(*arguments, cwd, **more):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """A result file of two methods on two tasks, from one process."""
    folder = tmp_path_factory.mktemp("eval")
    options = ("--methods", "visionzip,fastv:0.5", "--budgets", "64", "--out", "r.json", "--json")
    done = call("-m", "vtc", "eval", *TWO, *FEW, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "r.json", json.loads(done.stdout)


def test_scores_times_and_tokens(finished):
    path, printed = finished
    result = read(path)
    assert printed == result
    assert set(result["cells"]) == {"dense", "visionzip:64", "fastv:0.5"}
    assert result["run"]["suite"]["tasks"] == TWO[1].split(",")
    for name, cell in result["cells"].items():
        right = 0
        for task in TWO[1].split(","):
            scores = cell["tasks"][task]["scores"][task]
            samples = cell["tasks"][task]["samples"][task]
            assert samples["ids"] == [0, 1, 2]
            assert scores["exact_match"] == pytest.approx(sum(samples["scores"]) / 3)
            right += sum(samples["scores"])
        assert cell["accuracy"]["overall"]["right"] == right == cell["correct"].count("1")
        assert cell["accuracy"]["overall"]["questions"] == 6
        assert cell["ttft_ms"]["median"] > cell["tpot_ms"]["median"] > 0
        if name != "dense":
            assert cell["selection_ms"]["median"] > 0
            assert 0 <= cell["agreement_with_dense"] <= 1
            assert cell["kv_bytes"] < cell["kv_bytes_dense"]
    assert result["cells"]["dense"]["correct"].count("1") >= 4
    assert result["cells"]["visionzip:64"]["tokens"]["entering_llm"] == 64
    tokens = result["cells"]["fastv:0.5"]["tokens"]
    assert (tokens["entering_llm"], tokens["after_last_cut"]) == (576, 288)


def test_the_questions_and_answers_are_those_of_the_drawn_scenes(finished):
    import torch

    from vtc.engine import compress
    from vtc.eval.scenes.draw import scene_suite
    from vtc.loading import load

    drawn = [(s, q) for s, q in scene_suite("test", 25, 0) if q.category == "count"][:3]
    loaded = load(device="cpu")
    expected = []
    with compress(loaded.model, "visionzip:64"), torch.inference_mode():
        for scene, question in drawn:
            inputs = loaded.inputs(scene.image, question.prompt)
            ids = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            expected.append(loaded.answer(ids[0], inputs["input_ids"].shape[1]))
    samples = read(finished[0])["cells"]["visionzip:64"]["tasks"]["vtc_scenes_count"]["samples"]["vtc_scenes_count"]
    assert samples["answers"] == expected
    assert samples["scores"] == [float(a == q.answer) for a, (_, q) in zip(expected, drawn, strict=True)]


def test_results_can_be_compared(finished):
    result = read(finished[0])
    rows = {row["cell"]: row for row in compare(result, result)}
    assert rows["visionzip:64"]["accuracy"]["difference"] == 0
    assert rows["visionzip:64"]["accuracy"]["p"] == 1


SESSION = """
import json, sys
from pathlib import Path
from vtc.errors import VTCError
from vtc.eval.lmms.evaluate import Settings, sweep
from vtc.eval.lmms.models import BASES, Compressed

path, told = Path("r.json"), []
tasks = ("vtc_scenes_colour", "vtc_scenes_count")
for settings in (Settings(tasks, limit=3), Settings(tasks, limit=2), Settings(("vtc_scene_colour",))):
    try:
        sweep(settings, ["visionzip:64"], device="cpu", path=path)
        told.append("")
    except VTCError as error:
        told.append(f"{type(error).__name__}: {error}")

from lmms_eval.models import get_model, get_model_manifest

classes = {}
for base in (*BASES, "scenes_llava"):
    known = get_model_manifest("vtc_" + base)
    for kind in ("simple", "chat"):
        if getattr(known, kind + "_class_path"):
            cls = get_model("vtc_" + base, force_simple=kind == "simple")  # also checks that it is of this kind
            classes[cls.__name__] = issubclass(cls, Compressed) and cls.is_simple == (kind == "simple")
print(json.dumps([told, classes]))
"""


def test_finished_tasks_are_not_run_again_and_mistakes_are_told(finished, call, tmp_path):
    stored = json.loads(finished[0].read_text())
    marked = stored["cells"]["visionzip:64"]["tasks"]["vtc_scenes_colour"]
    marked["seconds"] = -1.0
    del stored["cells"]["visionzip:64"]["tasks"]["vtc_scenes_count"]  # as if it was killed there
    (tmp_path / "r.json").write_text(json.dumps(stored))
    done = call("-c", SESSION, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    again, before = read(tmp_path / "r.json")["cells"], read(finished[0])["cells"]
    assert again["visionzip:64"]["tasks"]["vtc_scenes_colour"]["seconds"] == -1.0
    for name in before:
        assert again[name]["answers"] == before[name]["answers"]
        assert again[name]["accuracy"] == before[name]["accuracy"]
        assert again[name].get("against") == before[name].get("against")
    (fine, settings, task), classes = json.loads(done.stdout.splitlines()[-1])
    assert fine == ""
    assert settings.startswith("InputError")
    assert "other settings" in settings
    assert task.startswith("SpecError")
    assert "Did you mean 'vtc_scenes_colour'" in task
    assert all(classes.values())
    assert {"chat_llava_hf", "simple_qwen2_vl", "chat_qwen2_5_vl", "chat_qwen3_vl", "chat_internvl_hf"} <= set(classes)


@pytest.mark.slow
def test_two_processes_score_as_one(finished, call, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    options = ("--methods", "visionzip:64", "--out", "r.json")
    done = call(
        *launch, *plain, "-m", "vtc", "eval", *TWO, *FEW, *options, cwd=tmp_path, ACCELERATE_USE_CPU="1"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = read(tmp_path / "r.json")["cells"], read(finished[0])["cells"]
    for name in ("dense", "visionzip:64"):
        assert two[name]["answers"] == one[name]["answers"]
        assert two[name]["accuracy"] == one[name]["accuracy"]
    # three questions of a task in two processes: two each, one of them only to keep in step
    assert len(two["dense"]["tasks"]["vtc_scenes_colour"]["requests"]["ttft_ms"]) == 4


CLI = ("-m", "lmms_eval", "--model", "vtc_scenes_llava", "--include_path", str(TASKS), "--tasks", "vtc_scenes_colour")


def test_lmms_evals_command_line(call, tmp_path, finished):
    options = ("--model_args", "method=visionzip,budget=64", "--output_path", "out", *FEW)
    done = call(*CLI, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("*_results.json")
    result = json.loads(path.read_text())
    ours = read(finished[0])["cells"]["visionzip:64"]["accuracy"]["vtc_scenes_colour"]
    assert result["results"]["vtc_scenes_colour"]["exact_match,none"] == pytest.approx(ours["accuracy"], abs=1e-4)
    throughput = result["throughput"]
    assert throughput["avg_entering_llm"] == 64
    assert throughput["avg_ttft_ms"] > throughput["avg_tpot_ms"] > 0
    assert throughput["avg_selection_ms"] > 0


def test_a_raising_hook_ends_lmms_evals_command_line_with_its_cause(call, tmp_path):
    script = tmp_path / "raising.py"
    script.write_text(RAISING)
    options = ("--model_args", "method=fastervlm,budget=64", "--output_path", "out", *FEW)
    done = call(str(script), *CLI[1:], *options, cwd=tmp_path)
    assert done.returncode != 0
    assert "RuntimeError: boom in our hook" in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_a_raising_hook_ends_vtc_eval_with_its_cause(call, tmp_path):
    script = tmp_path / "raising.py"
    script.write_text(RAISING)
    options = ("--methods", "fastervlm,uniform", "--tasks", "vtc_scenes_colour", "--out", "r.json", "--keep-going")
    done = call(str(script), "vtc", "eval", *options, "--limit", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "fastervlm:64" in done.stderr
    assert "boom in our hook" in done.stderr
    cells = read(tmp_path / "r.json")["cells"]
    assert "boom in our hook" in cells["fastervlm:64"]["failed"]
    assert "tasks" not in cells["fastervlm:64"]
    assert cells["uniform:64"]["accuracy"]["overall"]["questions"] == 1


DATA = Path(__file__).with_name("lmms_local_data.py")
BENCHMARKS = ("pope", "mme", "gqa", "textvqa", "scienceqa", "mmbench", "vqav2")


@pytest.fixture(scope="module")
def local(call, tmp_path_factory):
    """lmms-eval's own scorers on rows that we drew: the cells of the result, and the rows."""
    folder = tmp_path_factory.mktemp("local")
    made = call(str(DATA), str(folder), cwd=folder)
    assert made.returncode == 0, made.stderr[-3000:]
    tasks = ",".join(f"local_{name}" for name in BENCHMARKS)
    options = ("--methods", "random:8", "--include-path", str(folder), "--out", "r.json", "--device", "cpu")
    done = call("-m", "vtc", "eval", "--tasks", tasks, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder / "r.json")["cells"], json.loads((folder / "truths.json").read_text())


def consensus(answer, given):
    """VQA accuracy: mean over people of min(1, others who gave this answer / 3)."""
    others = [sum(g == answer for j, g in enumerate(given) if j != i) for i in range(len(given))]
    return sum(min(1, count / 3) for count in others) / len(given)


def f1(pairs):
    true = sum(a == "yes" and t == "yes" for a, t in pairs)
    said, was = sum(a == "yes" for a, _ in pairs), sum(t == "yes" for _, t in pairs)
    precision, recall = (true / said if said else 0), (true / was if was else 0)
    return 2 * precision * recall / (precision + recall) if true else 0


def yes_no_pairs(answers, rows):
    """MME: per picture, 100 times the share of right answers, and 100 more if both are right."""
    right = [a.lower().startswith(row["answer"].lower()) for a, row in zip(answers, rows, strict=True)]
    return [50.0 * sum(right[i : i + 2]) + 100.0 * all(right[i : i + 2]) for i in (0, 2)]


@pytest.mark.parametrize("name", ["dense", "random:8"])
def test_the_real_scorers_give_the_scores_that_the_definitions_give(local, name):
    cells, truths = local
    tasks = cells[name]["tasks"]

    def answers(benchmark):
        return [text.strip() for text in tasks[f"local_{benchmark}"]["samples"][f"local_{benchmark}"]["answers"]]

    def score(benchmark, metric="exact_match"):
        return tasks[f"local_{benchmark}"]["scores"][f"local_{benchmark}"][metric]

    pope = list(zip(answers("pope"), (row["answer"] for row in truths["pope"]), strict=True))
    assert score("pope", "pope_accuracy") == sum(a == t for a, t in pope) / 4
    assert score("pope", "pope_f1_score") == pytest.approx(f1(pope))
    perception, cognition = yes_no_pairs(answers("mme"), truths["mme"])
    assert score("mme", "mme_perception_score") == perception
    assert score("mme", "mme_cognition_score") == cognition
    gqa = [a.lower() == row["answer"] for a, row in zip(answers("gqa"), truths["gqa"], strict=True)]
    assert score("gqa") == sum(gqa) / 4
    for benchmark in ("textvqa", "vqav2"):
        given = [[a["answer"] if isinstance(a, dict) else a for a in row["answers"]] for row in truths[benchmark]]
        expected = [consensus(a, g) for a, g in zip(answers(benchmark), given, strict=True)]
        assert score(benchmark) == pytest.approx(sum(expected) / 4)
    letters = ["AB"[row["answer"]] for row in truths["scienceqa"]]
    assert score("scienceqa") == sum(a == t for a, t in zip(answers("scienceqa"), letters, strict=True)) / 4
    assert 0 <= score("mmbench", "gpt_eval_score") <= 100


def test_the_dense_model_is_right_and_eight_tokens_are_not(local):
    cells, _ = local
    dense, few = (cells[name]["tasks"] for name in ("dense", "random:8"))
    for task in ("local_pope", "local_gqa", "local_vqav2"):
        metric = "pope_accuracy" if task == "local_pope" else "exact_match"
        assert dense[task]["scores"][task][metric] > few[task]["scores"][task][metric]
    # consensus below 1 where few people gave the right answer
    assert dense["local_vqav2"]["scores"]["local_vqav2"]["exact_match"] < 1
    assert "correct" not in cells["dense"]


def test_scorers_that_read_letters(local):
    assert local[1]["letters"] == {"scienceqa": [1.0, 1.0, 0.0, 0.0], "mmbench": 0.5}
