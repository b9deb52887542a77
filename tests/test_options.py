"""Rules of options: declared in annotations, checked by the base class, inherited and overridden like fields."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from vtc.errors import SpecError
from vtc.options import Ascending, AtLeastOne, Count, Depth, OneOf, Positive, Score, Share, Within
from vtc.stages import Method


@dataclass(frozen=True)
class Ruled(Method):
    slug = "ruled"

    score: Score = "cls"
    alpha: Share = 0.5
    width: Positive = 1.0
    first: Count = 0
    each: AtLeastOne = 1
    bounds: Annotated[tuple[float, ...], Within("(-1, 1)", "cosines")] = ()
    layers: Annotated[tuple[int, ...], Ascending()] = ()
    layer: Annotated[int | float, Depth()] = 0.5
    evict: Annotated[int | float, Depth(or_zero=True)] = 0
    free: int = 0


@dataclass(frozen=True)
class Wider(Ruled):
    score: Annotated[str, OneOf("cls", "mean")] = "mean"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0, "width": 1e-9, "bounds": (0.9, -0.9), "layers": (1, 2), "layer": 1, "evict": 0.5},
        {"alpha": 1.0, "score": "received", "layer": 3, "evict": 3.0, "free": -7},
    ],
)
def test_values_that_hold(options):
    assert Ruled(**options).options().keys() <= options.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "mean"}, "score='mean' of method 'ruled' is unknown. Use one of: cls, received."),
        ({"alpha": 1.5}, "alpha=1.5 of method 'ruled': use a share in [0, 1]."),
        ({"alpha": float("nan")}, "alpha=nan of method 'ruled': use a share in [0, 1]."),
        ({"width": 0.0}, "width=0.0 of method 'ruled': use a number in (0, inf)."),
        ({"first": -1}, "first=-1 of method 'ruled': use a number in [0, inf)."),
        ({"each": 0}, "each=0 of method 'ruled': use a number in [1, inf)."),
        ({"bounds": (0.5, 1.0)}, "bounds=(0.5, 1.0) of method 'ruled': use cosines in (-1, 1)."),
        ({"layers": (2, 2)}, "layers=(2, 2) of method 'ruled': ascending decoder layers"),
        ({"layers": (0, 2)}, "layers=(0, 2) of method 'ruled': ascending decoder layers"),
        ({"layer": 0}, "layer=0 of method 'ruled': the number of a decoder layer"),
        ({"layer": 1.5}, "layer=1.5 of method 'ruled': the number of a decoder layer"),
        ({"evict": -1}, "or a share of the depth between 0 and 1 (0: none)."),
    ],
)
def test_values_that_break_a_rule(options, message):
    with pytest.raises(SpecError) as caught:
        Ruled(**options)
    assert message in str(caught.value)


def test_a_subclass_has_its_own_rule_and_inherits_the_others():
    assert Wider().score == "mean"
    with pytest.raises(SpecError, match="Use one of: cls, mean"):
        Wider(score="received")
    with pytest.raises(SpecError, match="alpha=2"):
        Wider(alpha=2.0)
