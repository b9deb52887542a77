"""What methods claim about themselves is backed by something: fidelity, published numbers, and the list of methods."""

import inspect
import re
from pathlib import Path

import pytest

import vtc
from vtc.catalogue.registry import method_class

ROOT = Path(__file__).parents[1]
PAPERS = [slug for slug in vtc.methods() if method_class(slug).fidelity != "control"]


def with_fidelity(*names):
    return [slug for slug in vtc.methods() if method_class(slug).fidelity in names]


def source_of_tests(slug):
    return (ROOT / "tests" / "methods" / f"test_{Path(inspect.getsourcefile(method_class(slug))).stem}.py").read_text()


@pytest.mark.parametrize("slug", with_fidelity("golden"))
def test_golden_methods_replay_recorded_outputs(slug):
    """Vectors are committed under the name that the tests of the method ask for, and those make the method."""
    text = source_of_tests(slug)
    names = set(re.findall(r'golden_cases,? ?\(?"([a-z0-9-]+)"', text))
    assert names, "the tests of the method read no recorded outputs"
    assert all(list((ROOT / "tests" / "golden").glob(f"{name}__*.npz")) for name in names)
    assert slug in text or method_class(slug).__name__ in text


@pytest.mark.parametrize("slug", with_fidelity("reconstructed"))
def test_reconstructed_methods_say_from_what(slug):
    assert re.search(r"[Rr]econstructed\s+from", method_class(slug).__doc__), "name what was read"


@pytest.mark.parametrize("slug", with_fidelity("paper", "reconstructed"))
def test_choices_of_methods_without_code_are_options(slug):
    assert vtc.describe(slug)["options"]


@pytest.mark.parametrize("slug", PAPERS)
def test_the_docstring_names_the_paper(slug):
    classes = [cls for cls in method_class(slug).__mro__ if issubclass(cls, vtc.Method)]
    assert any(method_class(slug).paper.arxiv in (cls.__doc__ or "") for cls in classes)


@pytest.mark.parametrize("slug", [slug for slug in PAPERS if vtc.describe(slug)["headline"]])
def test_published_numbers_state_a_budget_and_where_they_were_read(slug):
    claim, _, source = vtc.describe(slug)["headline"].rpartition("; ")
    assert re.search(r"\d", claim)
    assert re.search(r"token|FLOPs|GemFilter", claim), "a budget and what it counts"
    assert re.search(r"paper|abstract|README|page|HoloV", source), "where it was read"
    assert claim.isprintable() and not source.endswith(".")


def test_published_numbers_are_not_inherited():
    class Derived(method_class("visionzip")):
        slug = "derived-visionzip"

    vtc.register(Derived)
    try:
        assert vtc.describe("visionzip")["headline"]
        assert vtc.describe("derived-visionzip")["headline"] == ""
    finally:
        del vtc.catalogue.registry.METHODS["derived-visionzip"]
