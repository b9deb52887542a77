"""The list of methods: a plain dict filled by explicit imports.

Everything that lists methods (CLI, tables, demo, conformance suite) reads it from here. The package of our own methods
is named, not imported: its modules import `register`.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

from vtc.catalogue.names import METHODS
from vtc.errors import SpecError, unknown_name
from vtc.stages import Method, Stage
from vtc.tokens import Budget

FIDELITIES = ("golden", "paper", "reconstructed", "control")

#: the package whose import registers our methods
METHOD_PACKAGE = "vtc.methods"

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator that makes a method known by its slug.

    Raises:
        SpecError: the slug is taken, or a declaration is missing.
    """
    _load()
    for attribute in ("slug", "steps", "fidelity"):
        if not hasattr(cls, attribute):
            raise SpecError(f"method class {cls.__name__} does not declare {attribute!r}.")
    if cls.fidelity not in FIDELITIES:
        raise SpecError(f"{cls.__name__}.fidelity={cls.fidelity!r}: use one of {', '.join(FIDELITIES)}.")
    if cls.paper is None and cls.fidelity != "control":
        raise SpecError(f"{cls.__name__} has no paper and is no control: declare paper=Paper(title, arxiv).")
    taken = METHODS.get(cls.slug)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SpecError(f"method {cls.slug!r} is already registered by {taken.__module__}. Choose another slug.")
    METHODS[cls.slug] = cls
    return cls


def methods() -> tuple[str, ...]:
    """The slugs of all registered methods, sorted."""
    _load()
    return tuple(sorted(METHODS))


def method_class(slug: str) -> type[Method]:
    """The class registered as `slug`.

    Raises:
        SpecError: there is none; the nearest name is suggested.
    """
    _load()
    if slug not in METHODS:
        raise unknown_name("method", slug, METHODS, "vtc methods")
    cls: type[Method] = METHODS[slug]
    return cls


def create(slug: str, **options: Any) -> Method:
    """The method `slug` with its fields set from `options`; text values are converted to the type of the default.

    Raises:
        SpecError: unknown method, unknown option, or a value of the wrong type.

    Example:
        >>> create("fastv", layer=3).layer
        3
    """
    cls = method_class(slug)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise SpecError(f"method {slug!r} has no option {name!r}. Options: {', '.join(sorted(fields))}.")
        default = fields[name].default
        if name == "budget":
            value = None if value is None else Budget.of(value)
        elif isinstance(value, str) and not isinstance(default, str):
            value = _convert(slug, name, value, default)
        else:
            _check_type(slug, name, value, default)
        values[name] = value
    return cls(**values)


def from_dict(data: dict[str, Any]) -> Method:
    """The method that `Method.to_dict` wrote.

    Raises:
        SpecError: another version, or an unknown method or option.
    """
    options = dict(data)
    if options.pop("version", None) != 1:
        raise SpecError(f"method dict of version {data.get('version')!r}: this vtc reads version 1.")
    budget = options.pop("budget", None)
    if budget is not None:
        options["budget"] = Budget(**budget)
    return create(options.pop("method"), **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def declared(slug: str) -> dict[str, Any]:
    """What a method declares, as plain data; `vtc.describe` adds on request where it runs.

    Raises:
        SpecError: there is no such method.
    """
    cls = method_class(slug)
    try:
        stages = cls(budget=Budget(tokens=64)).stages()
    except TypeError as error:  # a field without default cannot be described, and cannot be used from a string either
        raise SpecError(f"method {slug!r} has a field without default: {error}") from error
    return {
        "method": slug,
        "title": cls.paper.title if cls.paper else (cls.__doc__ or "").strip().splitlines()[0],
        "arxiv": cls.paper.arxiv if cls.paper else None,
        "venue": cls.paper.venue if cls.paper else None,
        "sites": _places(stages),
        "signals": sorted({signal.name for stage in stages for signal in stage.signals}),
        "filter": cls.steps[0],
        "correlate": cls.steps[1],
        "compress": cls.steps[2],
        "fidelity": cls.fidelity,
        # not inherited: a subclass is another method than the one that was measured
        "headline": vars(cls).get("headline", ""),
        "requires": cls.requires,
        "adaptive": "adaptive" in cls.tags,
        "tags": sorted(cls.tags),
        "positions": cls.positions,
        "defaults": dict(cls.defaults),
        "options": {f.name: f.default for f in dataclasses.fields(cls) if f.name != "budget"},
    }


def _load() -> None:
    """Register our methods, before any other: a slug that they bear is taken."""
    importlib.import_module(METHOD_PACKAGE)


def _places(stages: Sequence[Stage]) -> list[str]:
    """Where the stages act; layers in a row that are frozen share a name."""
    runs: list[list[Stage]] = []
    for stage in stages:
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and before.freezes
            and stage.freezes
            and isinstance(before.site.index, int)
            and stage.site.index == before.site.index + 1
        ):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return [run[0].place if len(run) == 1 else f"layer[{run[0].site.index}..{run[-1].site.index}]" for run in runs]


def _convert(slug: str, name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            kind = type(default[0]) if default else _number
            return tuple(kind(part) for part in text.split("|"))
    except (ValueError, KeyError):
        raise SpecError(
            f"{name}={text!r} for method {slug!r}: a {type(default).__name__} such as {default!r} is expected."
        ) from None
    return text


def _number(text: str) -> int | float:
    """An integer where it looks like one."""
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)


def _check_type(slug: str, name: str, value: Any, default: Any) -> None:
    fits = default is None or isinstance(value, type(default)) or (isinstance(default, float) and type(value) is int)
    if isinstance(value, bool) != isinstance(default, bool) and default is not None:
        fits = False
    if not fits:
        raise SpecError(
            f"{name}={value!r} for method {slug!r}: a {type(default).__name__} such as {default!r} is expected."
        )
