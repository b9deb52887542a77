"""The spec language: methods as one string, written as `vtc.grammar` says.

"@" sets the field that the method names as its place (`dart@2` is `dart(layer=2)`). Stages compose in the order of
their sites, whatever the order of the segments.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vtc.budget import Budget
from vtc.catalogue.registry import create, method_class
from vtc.errors import SpecError
from vtc.grammar import Segment, segments
from vtc.stages import Method


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
        found = [_method(segment) for segment in segments(spec)]
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


def _method(segment: Segment) -> Method:
    cls = method_class(segment.slug)
    options: dict[str, Any] = dict(segment.options)
    if segment.at is not None:
        if cls.at is None:
            raise SpecError(f"method {cls.slug!r} has no place to set with '@'. Write '{cls.slug}' alone.")
        if cls.at in options:
            raise SpecError(f"option {cls.at!r} of method {cls.slug!r} is given twice: '@' sets it too.")
        options[cls.at] = segment.at
    if "budget" in options and segment.budget is not None:
        raise SpecError(f"option 'budget' of method {cls.slug!r} is given twice: ':' sets it too.")
    options.setdefault("budget", segment.budget)
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
