"""Published tables: the files are right, and measured numbers land in the right column."""

import re
import subprocess
import sys

import pytest

import vtc
from vtc.catalogue.registry import method_class
from vtc.catalogue.tables import models_table
from vtc.errors import SpecError
from vtc.eval.lmms import presets
from vtc.eval.lmms.evaluate import TASKS
from vtc.extras import available

NAMES = presets.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_can_run_or_says_what_it_awaits(name):
    preset = presets.load(name)
    assert preset.arxiv is not None
    assert re.fullmatch(r"\d{4}\.\d{5}", preset.arxiv)
    assert preset.rows
    assert all(row.published for row in preset.rows)
    assert preset.source
    assert preset.convention
    # the checkpoint is one of those that the docs list for a wrapped family
    assert preset.model in models_table()
    for numbers in (preset.dense, *(row.published for row in preset.rows)):
        assert all(0 < value < 2800 for value in numbers.values())
    if preset.awaits is not None:
        with pytest.raises(SpecError, match=preset.method):
            _ = preset.specs
        return
    assert method_class(preset.method).paper.arxiv == preset.arxiv
    methods = [vtc.parse(spec) for spec in preset.specs]
    assert {method.slug for parts in methods for method in parts} == {preset.method}
    assert all(method.budget is not None for parts in methods for method in parts)
    assert preset.settings().tasks


def test_every_registered_method_with_a_published_table_has_a_preset():
    covered = {presets.load(name).method for name in NAMES}
    # their papers' tables were not read, are figures, or are about another quantity than the method here
    without = {
        "efficientvla", "flashvla", "fopru", "g-prune", "greedyprune", "learning-free", "mustdrop", "pact",
        "prumerge-plus", "sparsity-meets-similarity", "tokencorr",
    }  # fmt: skip
    assert not covered & without
    known = {
        "cdpruner",
        "dart",
        "divprune",
        "fastervlm",
        "fastv",
        "hired",
        "prumerge",
        "todre",
        "visionzip",
        "vispruner",
    }
    assert known | {"vtc-cls"} <= covered


@pytest.mark.skipif(not available("lmms_eval"), reason="lmms-eval is not installed: pip install 'vtc-toolkit[eval]'")
def test_every_task_exists_in_lmms_eval():
    tasks = {column.task for name in NAMES for column in presets.load(name).columns.values() if column.task}
    code = (
        "import sys; from lmms_eval.tasks import TaskManager\n"
        f"index = TaskManager('ERROR', include_path=[{str(TASKS)!r}]).task_index\n"
        f"sys.exit(', '.join(sorted(set({sorted(tasks)!r}) - set(index))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_aliases_and_unknown_names():
    assert presets.load("visionzip-table1").name == "visionzip-llava-1.5-7b"
    with pytest.raises(SpecError, match="fastv-table1"):
        presets.load("fastv-table2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense = { GQA = 1.0 }\n[columns.MME]\nnote = 'x'", "'GQA', which is no column"),
        ("dense = {}\n[columns.GQA]\ntask = 'gqa'", "needs task and metrics"),
        ("dense = {}\n[columns.GQA]\ntusk = 'gqa'", "tusk"),
        ("[columns.GQA]\nnote = 'x'", "dense"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    start = "title='t'\nmethod='fastv'\nmodel='m'\nsource='s'\nconvention='c'\nrows=[]\n"
    (tmp_path / "p.toml").write_text(start + text)
    with pytest.raises(SpecError, match=message):
        presets.read(tmp_path / "p.toml")


def test_measured_numbers_stand_beside_the_published_ones():
    preset = presets.load("visionzip-llava-1.5-7b")

    def cell(gqa, perception, cognition):
        return {
            "tasks": {
                "gqa": {"scores": {"gqa": {"exact_match": gqa}}},
                "mme": {"scores": {"mme": {"mme_perception_score": perception, "mme_cognition_score": cognition}}},
            }
        }

    result = {"cells": {"dense": cell(0.62, 1500, 350), "visionzip:64": cell(0.55, 1400, 300)}}
    assert presets.measured(preset, result, "visionzip:64") == {"GQA": pytest.approx(55), "MME": 1700}
    assert presets.measured(preset, result, "visionzip:192") == {}
    lines = {(label, what): numbers for label, what, numbers in presets.comparison(preset, result)}
    assert lines["all tokens", "published"]["GQA"] == "61.9"
    assert lines["all tokens", "measured"]["GQA"] == "62.00"
    assert lines["64 tokens", "difference"] == {"GQA": "-0.10", "MME": "+10.00"}
    assert lines["192 tokens", "difference"] == {}


def test_a_group_without_its_own_score_is_the_mean_of_its_subtasks():
    preset = presets.load("holitom-llava-onevision-7b")
    scores = {"mvbench_a": {"mvbench_accuracy": 40.0}, "mvbench_b": {"mvbench_accuracy": 60.0}}
    result = {"cells": {"dense": {"tasks": {"mvbench": {"scores": scores}}}}}
    assert presets.measured(preset, result, None) == {"MVBench": 50.0}


def test_spec_strings_of_the_command_line():
    from vtc.eval.cli.lmms import _arguments, _specs

    assert _specs("visionzip, fastv", "64,50%") == ["visionzip:64", "visionzip:0.5", "fastv:64", "fastv:0.5"]
    assert _specs("fastervlm:128 + dart@3:64; fastv@3:0.5", "64") == ["fastervlm:128 + dart@3:64", "fastv@3:0.5"]
    assert _specs("fastv(query=mean, layer=4)", "8") == ["fastv@4:8(query=mean)"]
    assert len(_specs("all", "64")) == len(vtc.methods())
    with pytest.raises(SpecError, match="Did you mean 'visionzip'"):
        _specs("visionzap", "64")
    with pytest.raises(SpecError, match="no method given"):
        _specs(" ", "64")
    assert _arguments("max_pixels=1000, use_cache=true,dtype=bfloat16") == {
        "max_pixels": 1000, "use_cache": True, "dtype": "bfloat16",
    }  # fmt: skip
    with pytest.raises(SpecError, match="name=value"):
        _arguments("fast")
