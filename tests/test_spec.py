"""The spec language and the registry."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vtc
from vtc.catalogue.registry import register
from vtc.errors import SpecError


@st.composite
def random_methods(draw):
    slug = draw(st.sampled_from(["random", "fastv", "dart", "visionzip", "pool"]))
    options = {}
    if draw(st.booleans()):
        options["budget"] = draw(
            st.one_of(
                st.integers(1, 999), st.sampled_from([0.5, 0.25, 0.111]), st.just(vtc.Budget(tokens=5, per="tile"))
            )
        )
    if slug in ("fastv", "dart") and draw(st.booleans()):
        options["layer"] = draw(st.integers(1, 30))
    if slug == "random":
        options["seed"] = draw(st.integers(0, 99))
    if slug == "visionzip":
        options["variant"] = draw(st.sampled_from(["paper", "reference"]))
    return vtc.create(slug, **options)


@given(st.lists(random_methods(), min_size=1, max_size=3))
def test_parse_is_the_inverse_of_format(methods):
    assert list(vtc.parse(vtc.format_spec(methods))) == methods


@given(random_methods())
def test_dict_round_trip(method):
    assert vtc.from_dict(method.to_dict()) == method
    assert hash(method) == hash(vtc.from_dict(method.to_dict()))


def test_the_documented_example():
    first, second = vtc.parse("fastervlm:128 + dart@2:64")
    assert (first.slug, first.budget.tokens) == ("fastervlm", 128)
    assert (second.slug, second.layer, second.budget.tokens) == ("dart", 2, 64)


def test_budget_argument_fills_gaps_only():
    first, second = vtc.parse("fastervlm + dart:64", budget=128)
    assert first.budget.tokens == 128
    assert second.budget.tokens == 64


def test_budgets_with_units():
    (method,) = vtc.parse("random:40(per=tile, seed=3)")
    assert method.budget == vtc.Budget(tokens=40, per="tile")
    with pytest.raises(SpecError, match="without a budget"):
        vtc.parse("random(per=tile)")


@pytest.mark.parametrize(
    "text", ["random:6 +", "random((seed=1)", "random(seed)", "random(seed=1, seed=2)", "6:random"]
)
def test_strings_that_do_not_parse(text):
    with pytest.raises(SpecError):
        vtc.parse(text)


@pytest.mark.parametrize("slug", vtc.methods())
def test_every_method_describes_itself(slug):
    data = vtc.describe(slug)
    assert data["method"] == slug
    assert all(data[step] for step in ("filter", "correlate", "compress"))
    assert data["fidelity"] == "control" or data["arxiv"]
    assert repr(vtc.create(slug))


def test_registering_a_taken_slug_is_refused():
    class Imposter(vtc.Method):
        slug = "fastv"
        steps = ("a", "b", "c")
        fidelity = "control"

    with pytest.raises(SpecError, match="already registered"):
        register(dataclasses.dataclass(frozen=True)(Imposter))


def test_a_method_without_paper_is_refused():
    class Nameless(vtc.Method):
        slug = "nameless"
        steps = ("a", "b", "c")
        fidelity = "paper"

    with pytest.raises(SpecError, match="no paper"):
        register(Nameless)
    assert "nameless" not in vtc.methods()


def test_options_are_checked():
    with pytest.raises(SpecError, match="int"):
        vtc.create("fastv", layer=2.5)
    with pytest.raises(SpecError, match="int"):
        vtc.create("fastv", layer=True)
    with pytest.raises(SpecError, match="reads version 1"):
        vtc.from_dict({"version": 2, "method": "fastv"})
