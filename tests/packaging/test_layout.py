"""The folder layout keeps its promises: import names, wheel contents, and no clash with PyPI's `kernels`."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "adapters", "eval", "demos")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture
def stand_in(tmp_path):
    """A distribution called `kernels` of a version that transformers accepts, with the names that it imports."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.18.2'\n"
        "class _Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, *args, **kwargs): return args[0] if args else self\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return _Anything\n"
    )
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return tmp_path


IMPORT = "import transformers.modeling_utils; from transformers import LlavaForConditionalGeneration; print('fine')"


def test_transformers_imports_from_the_root():
    assert python(IMPORT) == "fine"


def test_transformers_imports_from_the_root_with_a_kernels_distribution(stand_in):
    where = python(
        "import kernels; " + IMPORT + "; import vtc.kernels; print(kernels.__file__); print(vtc.kernels.__file__)",
        PYTHONPATH=str(stand_in),
    )
    fine, theirs, ours = where.splitlines()
    assert fine == "fine"
    assert Path(theirs) == stand_in / "kernels" / "__init__.py"
    assert Path(ours).resolve() == (ROOT / "kernels" / "src" / "__init__.py").resolve()


def test_folders_of_other_peoples_names_are_no_packages():
    for folder in (*LINKED, "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    for folder in LINKED:
        assert (ROOT / folder / "README.md").exists(), folder


def test_links_point_where_they_should():
    for name in LINKED:
        link = ROOT / "vtc" / name
        assert link.resolve() == ROOT / name / "src"
        if link.is_symlink():
            assert os.readlink(link) == f"../{name}/src"
    assert (ROOT / "vtc" / "model_cards").resolve() == ROOT / "model_cards"


def test_every_package_folder_is_listed():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    found = {"vtc"}
    for path in (ROOT / "vtc").rglob("__init__.py"):
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT):
            found.add(".".join(path.parent.relative_to(ROOT).parts))
    for name in LINKED:
        for path in (ROOT / name / "src").rglob("__init__.py"):
            found.add(".".join(("vtc", name, *path.parent.relative_to(ROOT / name / "src").parts)))
    assert found | {"vtc.model_cards"} == listed


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_embedded_model(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vtc_toolkit-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"vtc/py.typed"}
    for path in (ROOT / "vtc").rglob("*.py"):
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT):
            expected.add(str(path.relative_to(ROOT)))
    for name in LINKED:
        source = ROOT / name / "src"
        files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        expected |= {f"vtc/{name}/{path.relative_to(source)}" for path in files}
    model = ROOT / "model_cards" / "scenes-llava"
    expected |= {f"vtc/model_cards/scenes-llava/{p.name}" for p in model.iterdir() if p.is_file()}
    assert expected - names == set()
    assert not any(name.startswith(("tests/", "kernels/", "adapters/", "eval/", "demos/")) for name in names)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_the_command_starts(where, tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "vtc", "--help"],
        cwd=ROOT if where == "root" else tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "run" in out
    assert "methods" in out


# who may import whom; a folder may always import itself and what is not ours
MAY_IMPORT = {
    "kernels": set(),
    "vtc": {"kernels"},
    "adapters": {"vtc", "kernels"},
    "eval": {"vtc", "kernels", "adapters"},
    "demos": {"vtc", "kernels", "adapters", "eval"},
}


def sources():
    for path in (ROOT / "vtc").rglob("*.py"):
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT):
            yield "vtc", path
    for name in LINKED:
        for path in (ROOT / name / "src").rglob("*.py"):
            yield name, path


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_dependencies_point_one_way():
    wrong = []
    for owner, path in sources():
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] != "vtc":
                continue
            target = parts[1] if len(parts) > 1 and parts[1] in LINKED else "vtc"
            if target != owner and target not in MAY_IMPORT[owner]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_methods_see_only_what_a_method_may_see():
    allowed = {"calibration", "errors", "kernels", "methods", "options", "primitives", "stages", "catalogue.registry"}
    allowed |= {"tokenmap", "tokens"}
    wrong = []
    for path in (ROOT / "vtc" / "methods").glob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "vtc" and not {*parts[1:2], ".".join(parts[1:3])} & allowed:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_the_registry_knows_nothing_above_it():
    """Methods import it, and the rest of the catalogue builds on it."""
    tree = ast.parse((ROOT / "vtc" / "catalogue" / "registry.py").read_text())
    below = {"vtc.catalogue.names", "vtc.errors", "vtc.stages", "vtc.tokens"}
    assert {name.rsplit(".", 1)[0] for name in imported(tree) if name.startswith("vtc.")} == below


def test_every_method_file_is_registered_and_tested():
    import vtc

    modules = {p.stem for p in (ROOT / "vtc" / "methods").glob("*.py")} - {"__init__"}
    classes = {vtc.catalogue.registry.method_class(slug).__module__.rsplit(".", 1)[1] for slug in vtc.methods()}
    assert modules == classes
    for slug in vtc.methods():
        module = vtc.catalogue.registry.method_class(slug).__module__.rsplit(".", 1)[1]
        if vtc.catalogue.registry.method_class(slug).fidelity != "control":
            assert (ROOT / "tests" / "methods" / f"test_{module}.py").exists(), slug


def test_every_golden_file_belongs_to_a_method():
    import vtc

    slugs = {path.name.split("__")[0] for path in (ROOT / "tests" / "golden").glob("*.npz")}
    # "ficoco" holds the cases of ficoco-v and ficoco-l
    known = {part for slug in vtc.methods() for part in (slug, slug.rsplit("-", 1)[0])}
    assert slugs <= known
