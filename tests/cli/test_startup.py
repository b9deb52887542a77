"""Help comes at once, and what is wrong is refused before torch, or before transformers and a model."""

import subprocess
import sys

import pytest

from vtc.eval.bench import architectures, tune
from vtc.eval.cli import _options
from vtc.eval.probe import calibrate

#: runs the command and says on standard output which of the slow packages were imported
CALL = """
import sys
from vtc.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
print("imported:", *(name for name in ("torch", "transformers") if name in sys.modules))
raise SystemExit(code)
"""


def call(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )
    return done, done.stdout.rpartition("imported:")[2].split()


@pytest.mark.parametrize(
    "command",
    [(), ("run",), ("bench",), ("bench", "compare"), ("tune",), ("calibrate",), ("eval",), ("doctor",), ("oracle",)],
    ids=" ".join,
)
def test_help_needs_no_torch(command, tmp_path):
    done, imported = call(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    assert imported == []


def test_names_in_help_are_those_of_what_bears_them():
    assert architectures.archs() == _options.ARCHITECTURES
    assert tuple(tune.COSTS) == _options.COSTS
    assert tuple(calibrate.CALIBRATIONS) == _options.CALIBRATIONS


def refused(arguments, message, cwd):
    """What was imported until a command ended with one sentence and exit code 2."""
    done, imported = call(*arguments.split(), cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    return imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --method visionzap", "unknown method 'visionzap'. Did you mean 'visionzip'?"),
        ("run --method visionzip(", "cannot read"),
        ("run --budget 0", "at least 1 token must stay"),
        ("run --method fastv:many", "budget 'many' is not a number"),
        ("run --positions left", "positions='left' is unknown. Use 'original',"),
        ("run --dtype flaot32", "dtype='flaot32' is unknown"),
        ("run --attention spda", "attention='spda' is unknown"),
        ("run --image missing.png", "no image at 'missing.png'"),
        ("run --model /nowhere/at/all", "cannot load '/nowhere/at/all'"),
        ("run --overlay no/such/folder.png", "there is no folder"),
        ("bench --methods visionzip,fastvv", "Did you mean 'fastv'?"),
        ("bench --budgets 64,many", "budget 'many' is not a number"),
        ("bench --positions left", "positions='left'"),
        ("bench --batches 1,x", "write batch sizes"),
        ("bench --data none.jsonl", "no file of questions at 'none.jsonl'"),
        ("bench --out no/such/b.json", "there is no folder"),
        ("bench --arch llava-1.5-8b", "unknown architecture 'llava-1.5-8b'. Did you mean 'llava-1.5-7b'?"),
        ("bench --dtype half", "dtype='half'"),
        ("tune --methods nothing", "unknown method 'nothing'"),
        ("tune --minimize tftt", "unknown cost 'tftt'. Did you mean 'ttft'?"),
        ("tune --budgets 0", "at least 1 token must stay"),
        ("tune --no-run", "no result file at 'bench.json'"),
        ("eval --methods fastvv", "Did you mean 'fastv'?"),
        ("eval --budgets many", "budget 'many' is not a number"),
        ("eval --positions left", "positions='left'"),
        ("eval --model-args batch", "is not of the form name=value"),
        ("calibrate shortvv --out o.json", "Did you mean 'shortv'?"),
        ("calibrate shortv --out o.json --data none.jsonl", "no file of questions"),
        ("calibrate shortv --out no/such/o.json", "there is no folder"),
        ("doctor /nowhere/at/all", "cannot load '/nowhere/at/all'"),
        ("doctor --self-check lava", "no family lava. Families: gemma3"),
        ("oracle lava", "no family lava. Families: gemma3"),
    ],
)
def test_refused_without_torch(arguments, message, tmp_path):
    assert refused(arguments, message, tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --method fastv(layr=3)", "method 'fastv' has no option 'layr'"),
        ("run --method fastv(layer=three)", "layer='three'"),
        ("run --method visionzip@3", "has no place to set with '@'"),
        ("run --device gpu", "device='gpu' is unknown"),
        ("run --device cuda:99", "device='cuda:99': torch sees"),
        ("bench --methods fastv(layer=three)", "layer='three'"),
        ("bench --device gpu", "device='gpu' is unknown"),
        ("tune --methods dart(what=1)", "method 'dart' has no option 'what'"),
        ("tune --target speed>=2", "speed"),
        ("eval --methods fastv(layer=three)", "layer='three'"),
        ("eval --preset nothing", "unknown preset 'nothing'"),
        ("calibrate shortv --out o.json --device gpu", "device='gpu' is unknown"),
        ("bench compare a.json b.json", "a.json"),
    ],
)
def test_refused_without_transformers(arguments, message, tmp_path):
    assert refused(arguments, message, tmp_path) == ["torch"]


def test_an_image_that_cannot_be_decoded_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "transformers" not in refused("run --image broken.png", "cannot be decoded", tmp_path)


def test_listing_methods_needs_no_transformers(tmp_path):
    done, imported = call("methods", cwd=tmp_path)
    assert done.returncode == 0
    assert imported == ["torch"]
