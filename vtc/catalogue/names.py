"""Names of methods and families, known without importing what bears them.

Methods and adapters import torch, which takes seconds. A command line that lists names, or refuses a wrong one, reads
them from the source of their files instead; tests compare them with the registries.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

from vtc.errors import UnsupportedModelError, unknown_name

#: slug -> class, of every method that was registered so far; `vtc.catalogue.registry` fills it
METHODS: dict[str, Any] = {}


def method_names() -> tuple[str, ...]:
    """The slugs of the methods that ship with vtc and of those that were registered beside them, sorted."""
    return tuple(sorted({*_declared("methods", "register", "slug"), *METHODS}))


def family_names() -> tuple[str, ...]:
    """The model families that ship with vtc, sorted."""
    return tuple(sorted(_declared("adapters", "register_adapter", "family")))


def check_method(slug: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        SpecError: it does not; the nearest name is suggested.
    """
    if slug not in method_names():
        raise unknown_name("method", slug, method_names(), "vtc methods")


def check_families(families: Iterable[str]) -> None:
    """Refuse families that do not exist.

    Raises:
        UnsupportedModelError: some do not.
    """
    known = family_names()
    unknown = sorted(set(families) - set(known))
    if unknown:
        raise UnsupportedModelError(f"no family {', '.join(unknown)}. Families: {', '.join(known)}.")


@functools.cache
def _declared(folder: str, decorator: str, attribute: str) -> frozenset[str]:
    """The strings that decorated classes in the files of `vtc/folder` set as `attribute`."""
    files = (file for file in resources.files("vtc").joinpath(folder).iterdir() if file.name.endswith(".py"))
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return frozenset(name for tree in trees for name in _strings(tree, decorator, attribute))


def _strings(tree: ast.Module, decorator: str, attribute: str) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or decorator not in map(ast.unparse, node.decorator_list):
            continue
        for line in node.body:
            match line:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if name == attribute:
                    yield text
