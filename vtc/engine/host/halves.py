"""Blocks cut in two: a pre-norm block is two residual halves, and a half whose module returns zeros is the identity.

So the block's own code runs twice, first with its MLP silenced and then with its attention silenced, and what stands
between the halves may change. No block is written again; norms, layer scales and dropout stay the host's.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from vtc.engine.host import names

#: the module whose output is zero in the running half of a block
_SILENT: ContextVar[nn.Module | None] = ContextVar("vtc_silent", default=None)


@contextlib.contextmanager
def silence(module: nn.Module) -> Iterator[None]:
    """Let `module` return zeros inside the block; it has to look at `is_silent`."""
    token = _SILENT.set(module)
    try:
        yield
    finally:
        _SILENT.reset(token)


def is_silent(module: nn.Module) -> bool:
    """Whether `module` belongs to the half that does not run."""
    return _SILENT.get() is module


def silenced(module: nn.Module, returns_tuple: bool, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a module that can be silenced; an attention may return its weights beside the output."""
    if not is_silent(module):
        return original(*args, **kwargs)
    nothing = torch.zeros_like(names.hidden_argument(args, kwargs))
    return (nothing, None) if returns_tuple else nothing
