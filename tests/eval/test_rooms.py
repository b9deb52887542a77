"""The rooms of `vtc.eval`: who may import whom, read from the imports themselves."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import vtc.eval

EVAL = Path(vtc.eval.__file__).parent
ROOMS = {"bench", "cli", "data", "kernel_bench", "lmms", "probe", "results", "scenes"}


def name_of(path):
    return ".".join(path.relative_to(EVAL).with_suffix("").parts)


PATHS = {name_of(path): path for path in EVAL.rglob("*.py") if path.name != "__init__.py"}


def imported(path):
    """Everything that a file imports, with the names that it takes from modules, as "vtc.eval.data.suites"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(path):
    """The files of `vtc.eval` among them, as "data.suites"."""
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] != ["vtc", "eval"]:
            continue
        whole = ".".join(parts[2:])
        yield whole if whole in PATHS else ".".join(parts[2:-1])


FILES = {name: set(files_of(path)) for name, path in PATHS.items()}


def room_of(file):
    return file.split(".")[0]


def test_everything_that_is_imported_exists():
    assert {other for wanted in FILES.values() for other in wanted} <= set(FILES)
    assert {room_of(file) for file in FILES if "." in file} == ROOMS


def test_no_circle():
    tuple(TopologicalSorter(FILES).static_order())  # raises CycleError
    rooms = {}
    for file, wanted in FILES.items():
        rooms.setdefault(room_of(file), set()).update({room_of(other) for other in wanted} - {room_of(file)})
    tuple(TopologicalSorter(rooms).static_order())


def test_only_the_commands_know_typer():
    """And the `vtc` command that they are added to."""
    wrong = {
        file
        for file, path in PATHS.items()
        if room_of(file) != "cli"
        and any(name.split(".")[0] == "typer" or name.startswith("vtc.cli.") for name in imported(path))
    }
    assert not wrong


def test_nothing_imports_a_command():
    assert not {file for file, wanted in FILES.items() if room_of(file) != "cli" and "cli" in map(room_of, wanted)}


def test_private_modules_stay_in_their_room():
    wrong = {
        (file, other)
        for file, wanted in FILES.items()
        for other in wanted
        if other.rpartition(".")[2].startswith("_") and room_of(other) != room_of(file)
    }
    assert not wrong
