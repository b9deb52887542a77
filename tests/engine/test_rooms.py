"""The rooms of the engine: who may import whom, read from the imports themselves."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import vtc.engine

ENGINE = Path(vtc.engine.__file__).parent
#: arrows between the files of the engine before it had rooms
ARROWS_OF_ONE_HALL = 94


def name_of(path):
    return ".".join(path.relative_to(ENGINE).with_suffix("").parts)


def imports():
    """file -> files of the engine that it imports, as "llm.door"."""
    paths = [path for path in ENGINE.rglob("*.py") if path != ENGINE / "__init__.py"]
    files = {name_of(path) for path in paths}
    found = {}
    for path in paths:
        wanted = found.setdefault(name_of(path), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vtc.engine"):
                continue
            base = node.module.removeprefix("vtc.engine").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                wanted.add(whole if whole in files else base)
    return found


FILES = imports()
ROOMS = {}
for file, wanted in FILES.items():
    ROOMS.setdefault(file.split(".")[0], set()).update(other.split(".")[0] for other in wanted)
ROOMS = {room: others - {room} for room, others in ROOMS.items()}


def test_everything_that_is_imported_exists():
    assert {other for wanted in FILES.values() for other in wanted} <= set(FILES)
    assert {"host", "llm", "vision", "patch", "plan", "decide", "handover"} <= set(ROOMS)


def test_no_circle():
    tuple(TopologicalSorter(FILES).static_order())  # raises CycleError
    tuple(TopologicalSorter(ROOMS).static_order())


def test_at_most_half_of_the_arrows():
    assert sum(len(others) for others in ROOMS.values()) <= ARROWS_OF_ONE_HALL // 2


def test_vision_and_the_language_model_do_not_know_each_other():
    assert "vision" not in ROOMS["llm"]
    assert "llm" not in ROOMS["vision"]


def test_a_stage_is_decided_without_a_host():
    """Serving calls it on plain tensors."""
    seen, todo = set(), ["decide", "handover", "plan"]
    while todo:
        room = todo.pop()
        seen.add(room)
        todo += [other for other in ROOMS.get(room, ()) if other not in seen]
    assert seen == {"decide", "handover", "plan"}


def test_the_host_knows_no_stage():
    assert ROOMS["host"] == set()
