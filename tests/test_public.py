"""`import vtc` gives what users and authors of methods and adapters need, and waits for nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
from vtc.adapter import adapter_classes
from vtc.catalogue.names import family_names, method_names

INIT = Path(vtc.__file__)


def fresh(code):
    """What `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def imported_names():
    """Name -> module of every import from vtc in vtc/__init__.py, those for type checkers included."""
    nodes = [node for node in ast.walk(ast.parse(INIT.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in nodes for alias in node.names if node.module.startswith("vtc")}


def test_all_is_sorted_and_is_what_can_be_imported():
    names = imported_names()
    assert vtc.__all__ == sorted(vtc.__all__)
    assert set(vtc.__all__) == set(names)
    for name, module in names.items():
        if name not in ("methods", "primitives"):
            assert getattr(vtc, name) is getattr(importlib.import_module(module), name)
    assert set(vtc.__all__) <= set(dir(vtc))


def test_every_error_is_there():
    assert {name for name in vars(vtc.errors) if name.endswith("Error")} <= set(vtc.__all__)


def test_importing_vtc_waits_for_nothing():
    code = (
        "import sys, vtc; from vtc.errors import SpecError; dir(vtc), vtc.Budget(tokens=8)\n"
        "print(*sorted({'torch', 'numpy', 'transformers', 'PIL', 'typer'} & set(sys.modules)))"
    )
    assert fresh(code) == []


def test_the_list_of_methods_and_their_package_share_a_name():
    """Whatever is imported first, `vtc.methods()` lists and `vtc.methods.NAME` is a class; none needs transformers."""
    code = (
        "import sys, vtc.methods.fastv, vtc\n"
        "print(len(vtc.methods()), vtc.methods.FastV.slug, vtc.create('fastv').slug, 'transformers' in sys.modules)"
    )
    assert fresh(code) == [str(len(vtc.methods())), "fastv", "fastv", "False"]


def test_our_methods_are_registered_before_any_other():
    code = (
        "import vtc\n"
        "class Mine(vtc.Method):\n"
        "    slug, steps, fidelity = 'fastv', ('', '', ''), 'control'\n"
        "try: vtc.register(Mine)\n"
        "except vtc.SpecError as error: print(error)"
    )
    assert "already" in fresh(code)


def test_modules_are_found_without_an_import_of_their_own():
    assert fresh("import vtc; print(vtc.stages.Stage is vtc.Stage, vtc.primitives.__name__)") == [
        "True",
        "vtc.primitives",
    ]


def test_what_does_not_exist():
    with pytest.raises(AttributeError, match="'vtc' has no attribute 'pacth'"):
        _ = vtc.pacth
    with pytest.raises(AttributeError):
        _ = vtc._nothing


def test_names_read_from_files_are_those_of_the_registries():
    assert method_names() == vtc.methods()
    assert family_names() == tuple(cls.family for cls in adapter_classes())
