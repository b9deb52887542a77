"""Examples in the documentation run, and generated tables are up to date."""

import doctest
import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from vtc.catalogue.tables import methods_page, models_table, signals_table
from vtc.engine.host import contract
from vtc.eval.results.page import markdown, page
from vtc.eval.scenes.card import card

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["docs/encoders.md", "docs/how-it-works.md", "docs/paradigm.md"])
def test_examples_run(page):
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize(
    "page", [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"], ids=lambda page: page.name
)
def test_every_file_that_is_named_exists(page):
    """Pages say where things are; files move."""
    named = re.findall(r"`((?:vtc|adapters|kernels|eval|tests|scripts|docs)/[\w./-]*\w)`", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_first_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "vtc.eval" not in example
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "visionzip:64 on llava" in capsys.readouterr().out


def test_the_page_of_methods_is_up_to_date():
    assert methods_page() == (ROOT / "docs" / "methods.md").read_text(), (
        "docs/methods.md is out of date: run `vtc methods --markdown > docs/methods.md`"
    )


@pytest.mark.parametrize(
    ("page", "table", "command"),
    [
        ("docs/paradigm.md", signals_table, "vtc signals --markdown` under 'What a stage may read"),
        ("docs/models.md", models_table, "vtc models --markdown"),
    ],
)
def test_generated_tables_are_up_to_date(page, table, command):
    assert table() in (ROOT / page).read_text(), f"{page} is out of date: paste the output of `{command}`"


#: rows of the README's table: the controls, and methods of every kind
SHOWN = (
    "random",
    "uniform",
    "pool",
    "downsample",
    "fastervlm",
    "visionzip",
    "divprune",
    "tome",
    "fastv",
    "dart",
    "sparsevlm",
    "pyramiddrop",
    "todre",
)


@pytest.mark.parametrize(
    ("name", "methods"), [("bench-scenes.json", SHOWN), ("bench-scenes-original-positions.json", None)]
)
def test_the_numbers_of_the_readme_are_those_of_the_committed_runs(name, methods):
    result = json.loads((ROOT / "benchmarks" / name).read_text())
    assert markdown(result, methods) in (ROOT / "README.md").read_text()


def test_the_results_page_is_that_of_the_committed_runs():
    stored = sorted((ROOT / "benchmarks").glob("bench-*.json"))
    assert stored
    assert page(stored) == (ROOT / "docs" / "results.md").read_text(), (
        "docs/results.md is out of date: run `vtc bench report benchmarks/bench-*.json --out docs/results.md`"
    )


def test_the_page_of_versions_is_that_of_the_supported_range():
    versions = runpy.run_path(str(ROOT / "scripts" / "verify-versions"))["VERSIONS"]
    newest = contract.Version(versions[-1]).release
    assert versions[0] == f"{contract.TESTED[0]}.0"
    assert contract.TESTED[1] == f"{newest[0]}.{newest[1] + 1}"
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 5.")]
    found = {row[0]: row for row in rows if len(row) == 7}
    assert set(versions) <= set(found)
    for version, passed, failed, *_ in found.values():
        assert int(passed) > 2000, version
        assert failed == "0", version


def test_the_card_of_the_embedded_model_states_what_was_measured():
    folder = ROOT / "model_cards" / "scenes-llava"
    record = json.loads((folder / "training.json").read_text())
    assert card(record) == (folder / "README.md").read_text(), (
        "the card is out of date: run `python -m vtc.eval.scenes.card model_cards/scenes-llava`"
    )
