"""Examples in the documentation run, and generated tables are up to date."""

import doctest
from pathlib import Path

import pytest

from vtc.tables import methods_table, models_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["docs/paradigm.md"])
def test_examples_run(page):
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize(
    ("page", "table", "command"),
    [
        ("docs/methods.md", methods_table, "vtc methods --markdown"),
        ("docs/models.md", models_table, "vtc models --markdown"),
    ],
)
def test_generated_tables_are_up_to_date(page, table, command):
    assert table() in (ROOT / page).read_text(), f"{page} is out of date: paste the output of `{command}`"
