"""The spec language: methods as one string.

    spec    = segment *( "+" segment )
    segment = slug [ "@" value ] [ ":" budget ] [ "(" option *( "," option ) ")" ]
    budget  = 64 | 0.25 | 25%
    option  = name "=" value            tuples are written with "|": layers=8|16|24

"@" sets the field that the method names as its place (`dart@2` is `dart(layer=2)`). Stages compose in the order of
their sites, whatever the order of the segments.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from vtc.catalogue.registry import create, method_class
from vtc.errors import SpecError
from vtc.stages import Method
from vtc.tokens import Budget

_SEGMENT = re.compile(
    r"^(?P<slug>[A-Za-z][A-Za-z0-9_-]*)"
    r"(?:@(?P<at>[^:()\s]+))?"
    r"(?::(?P<budget>[^()\s]+))?"
    r"(?:\((?P<options>[^()]*)\))?$"
)


def parse(
    spec: "str | Method | Iterable[Method]", budget: "int | float | str | Budget | None" = None
) -> tuple[Method, ...]:
    """The methods that `spec` names; `budget` goes to those that have none of their own.

    Raises:
        SpecError: the string does not follow the grammar, or names an unknown method or option.
        BudgetError: a budget is malformed.

    Example:
        >>> [m.slug for m in parse("fastervlm:128 + dart@2:64")]
        ['fastervlm', 'dart']
    """
    if isinstance(spec, Method):
        found = [spec]
    elif isinstance(spec, str):
        found = [_segment(text) for text in _split(spec)]
    else:
        found = list(spec)
        if not found or not all(isinstance(method, Method) for method in found):
            raise SpecError(f"a spec is a string, a method or a list of methods, not {spec!r}.")
    if budget is not None:
        default = Budget.of(budget)
        found = [_with_budget(m, default) if m.budget is None and m.wants_budget else m for m in found]
    return tuple(found)


def format_spec(methods: "Method | Iterable[Method]") -> str:
    """The string that `parse` turns into equal methods.

    Example:
        >>> format_spec(parse("dart@3:0.25"))
        'dart@3:0.25'
    """
    if isinstance(methods, Method):
        methods = [methods]
    return " + ".join(_format(method) for method in methods)


def _split(spec: str) -> list[str]:
    if not spec.strip():
        raise SpecError("the spec string is empty. Write for example 'visionzip:64' or 'fastervlm:128 + dart@2:64'.")
    # "+" inside parentheses belongs to an option
    return [part.strip() for part in re.split(r"\+(?![^(]*\))", spec)]


def _segment(text: str) -> Method:
    match = _SEGMENT.match(text)
    if match is None:
        raise SpecError(f"cannot read {text!r}. Write slug[@place][:budget][(name=value, ...)], e.g. 'dart@2:64'.")
    cls = method_class(match["slug"])
    options: dict[str, Any] = {}
    if match["at"] is not None:
        if cls.at is None:
            raise SpecError(f"method {cls.slug!r} has no place to set with '@'. Write '{cls.slug}' alone.")
        options[cls.at] = match["at"]
    if match["budget"] is not None:
        options["budget"] = Budget.of(match["budget"])
    for item in filter(None, (part.strip() for part in (match["options"] or "").split(","))):
        name, sign, value = (part.strip() for part in item.partition("="))
        if not sign or not name or not value:
            raise SpecError(f"option {item!r} of {text!r} is not of the form name=value.")
        if name in options:
            raise SpecError(f"option {name!r} of {text!r} is given twice.")
        options[name] = value
    if "per" in options:
        per = options.pop("per")
        if "budget" not in options:
            raise SpecError(f"{text!r} says per={per} without a budget. Write '{cls.slug}:64(per={per})'.")
        chosen = options["budget"]
        options["budget"] = Budget(tokens=chosen.tokens, ratio=chosen.ratio, per=per)
    return create(cls.slug, **options)


def _format(method: Method) -> str:
    options = method.options()
    text = method.slug
    if method.at is not None and method.at in options:
        text += f"@{_value(options.pop(method.at))}"
    if method.budget is not None:
        text += f":{method.budget}"
        if method.budget.per != "image":
            options["per"] = method.budget.per
    if options:
        text += "(" + ", ".join(f"{name}={_value(value)}" for name, value in options.items()) + ")"
    return text


def _value(value: Any) -> str:
    return "|".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _with_budget(method: Method, budget: Budget) -> Method:
    return dataclasses.replace(method, budget=budget)
