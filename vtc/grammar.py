"""How a spec string is written. Free of torch, so that a command line can refuse a wrong one at once.

    spec    = segment *( "+" segment )
    segment = slug [ "@" value ] [ ":" budget ] [ "(" option *( "," option ) ")" ]
    budget  = 64 | 0.25 | 25%
    option  = name "=" value            tuples are written with "|": layers=8|16|24

`vtc.spec` makes methods of it.
"""

import re
from typing import NamedTuple

from vtc.budget import Budget
from vtc.errors import SpecError

_SEGMENT = re.compile(
    r"^(?P<slug>[A-Za-z][A-Za-z0-9_-]*)"
    r"(?:@(?P<at>[^:()\s]+))?"
    r"(?::(?P<budget>[^()\s]+))?"
    r"(?:\((?P<options>[^()]*)\))?$"
)


class Segment(NamedTuple):
    """One method of a spec string as it is written: `options` are still text, and nobody has looked up the slug."""

    slug: str
    at: str | None
    budget: Budget | None
    options: dict[str, str]


def segments(spec: str) -> tuple[Segment, ...]:
    """The segments of a spec string.

    Raises:
        SpecError: the string does not follow the grammar.
        BudgetError: a budget is malformed.

    Example:
        >>> segments("dart@3:0.25")
        (Segment(slug='dart', at='3', budget=Budget(tokens=None, ratio=0.25, per='image'), options={}),)
    """
    if not spec.strip():
        raise SpecError("the spec string is empty. Write for example 'visionzip:64' or 'fastervlm:128 + dart@2:64'.")
    # "+" inside parentheses belongs to an option
    return tuple(_segment(part.strip()) for part in re.split(r"\+(?![^(]*\))", spec))


def _segment(text: str) -> Segment:
    match = _SEGMENT.match(text)
    if match is None:
        raise SpecError(f"cannot read {text!r}. Write slug[@place][:budget][(name=value, ...)], e.g. 'dart@2:64'.")
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in (match["options"] or "").split(","))):
        name, sign, value = (part.strip() for part in item.partition("="))
        if not sign or not name or not value:
            raise SpecError(f"option {item!r} of {text!r} is not of the form name=value.")
        if name in options:
            raise SpecError(f"option {name!r} of {text!r} is given twice.")
        options[name] = value
    per = options.pop("per", None)
    if match["budget"] is not None:
        return Segment(match["slug"], match["at"], Budget.of(match["budget"], per or "image"), options)
    if per is not None:
        raise SpecError(f"{text!r} says per={per} without a budget. Write '{match['slug']}:64(per={per})'.")
    return Segment(match["slug"], match["at"], None, options)
