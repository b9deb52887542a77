"""The one way in which a model is changed: hooks, and methods replaced on one instance, each with its way back."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Undo:
    """Changes of a model, each noted with what takes it off again; the last change goes first.

    Nothing of a class is touched: hooks belong to one module, and a replaced method is an attribute of one module.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def before(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Call `hook` with what enters `module`."""
        self._steps.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs).remove)

    def after(
        self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False, always_call: bool = False
    ) -> None:
        """Call `hook` with what leaves `module`; `always_call`: also when its forward raised."""
        handle = module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always_call)
        self._steps.append(handle.remove)

    def override(self, module: nn.Module, call: Callable[..., Any], name: str = "forward") -> None:
        """Put `call(original, ...)` in the place of the method `name` of this one module."""
        had = vars(module).get(name)
        original = getattr(module, name)

        @functools.wraps(original)  # hosts read the signatures of their methods
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return call(original, *args, **kwargs)

        setattr(module, name, replacement)
        self._steps.append(functools.partial(_restore, module, name, had))

    def take_off(self) -> None:
        """Take every change off; calling it twice does nothing."""
        while self._steps:
            self._steps.pop()()


def _restore(module: nn.Module, name: str, had: Any) -> None:
    if had is None:
        delattr(module, name)
    else:
        setattr(module, name, had)
