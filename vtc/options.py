"""What the options of a method may be, said where they are declared.

    score: Score = "cls"                                        # "cls" or "received"
    rule: Annotated[str, OneOf("mean", "top")] = "mean"
    alpha: Share = 0.5                                          # a number in [0, 1]
    window: Annotated[int, Within("[2, inf)")] = 3

`Method` checks every field that has such a rule; what concerns several fields at once stands in its `__post_init__`.
"""

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from vtc.errors import SpecError


class Rule:
    """What a value must be."""

    def holds(self, value: Any) -> bool:
        """Whether it is."""
        raise NotImplementedError

    def wanted(self) -> str:
        """What it must be, as the end of a sentence about a value that is not."""
        raise NotImplementedError


class OneOf(Rule):
    """One of some words."""

    def __init__(self, *values: str) -> None:
        self.values = values

    def holds(self, value: Any) -> bool:
        return value in self.values

    def wanted(self) -> str:
        return f" is unknown. Use one of: {', '.join(self.values)}."


@dataclass(frozen=True)
class Within(Rule):
    """A number, or numbers, in an interval such as "[0, 1)" or "(0, inf)"; `kind` names it in messages.

    Example:
        >>> Within("[0, 1)").holds(1.0), Within("(0, inf)").holds(0.5)
        (False, True)
    """

    interval: str
    kind: str = "a number"

    def holds(self, value: Any) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        values = value if isinstance(value, tuple) else (value,)
        above = all(low <= v if self.interval[0] == "[" else low < v for v in values)
        return above and all(v <= high if self.interval[-1] == "]" else v < high for v in values)

    def wanted(self) -> str:
        return f": use {self.kind} in {self.interval}."


@dataclass(frozen=True)
class Depth(Rule):
    """A decoder layer: below 1 a share of the depth, from 1 on its number (0-based); see `layer_at`."""

    or_zero: bool = False

    def holds(self, value: Any) -> bool:
        return (value > 0 and (value <= 1 or value == int(value))) or (value == 0 and self.or_zero)

    def wanted(self) -> str:
        return (
            ": the number of a decoder layer (0-based, from 1 on), or a share of the depth between 0 and 1"
            f"{' (0: none)' if self.or_zero else ''}."
        )


class Ascending(Rule):
    """Decoder layers from 1 on, ascending."""

    def holds(self, value: Any) -> bool:
        return all(low < high for low, high in zip((0, *value), value, strict=False))

    def wanted(self) -> str:
        return ": ascending decoder layers from 1 on (0-based), e.g. '8|16|24'."


#: where the text of a paper and its published code differ
Variant = Annotated[str, OneOf("paper", "reference")]
#: attention of [CLS], or what a token receives from all others, for towers without [CLS]
Score = Annotated[str, OneOf("cls", "received")]
Share = Annotated[float, Within("[0, 1]", "a share")]
Positive = Annotated[float, Within("(0, inf)")]
#: how many, or the number of a block
Count = Annotated[int, Within("[0, inf)")]
AtLeastOne = Annotated[int, Within("[1, inf)")]


def layer_at(value: int | float) -> int | float:
    """A checked `Depth` as `vtc.Site` takes it: a share of the depth, or a number from 1 on.

    Example:
        >>> layer_at(0.5), layer_at(2.0)
        (0.5, 2)
    """
    return int(value) if value >= 1 else value


def check_options(method: Any) -> None:
    """Validate the fields of the dataclass `method` by the rules in their annotations.

    Raises:
        SpecError: a value breaks its rule.
    """
    for name, rule in _rules(method.__class__).items():
        value = getattr(method, name)
        if not rule.holds(value):
            shown = repr(value) if isinstance(value, str) else value
            raise SpecError(f"{name}={shown} of method {method.slug!r}{rule.wanted()}")


@functools.cache
def _rules(cls: Any) -> Mapping[str, Rule]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ((name, rule) for name, hint in hints.items() for rule in getattr(hint, "__metadata__", ()))
    return {name: rule for name, rule in found if isinstance(rule, Rule)}
