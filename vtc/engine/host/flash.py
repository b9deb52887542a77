"""Flash attention: gaps in position ids must not reach it.

Given one prompt, several queries and no mask, transformers reads position ids that do not grow by one as sequences
packed behind each other, and takes the lengths of the keys from them. Rotations are made before the layers run, so
their position ids are left out.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from vtc.adapter import Adapter
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.errors import StateError


def attach(adapter: Adapter, cut_forward: Callable[[], object | None], undo: Undo) -> None:
    """Hook every decoder layer of a model with flash attention; what takes the hooks off again goes to `undo`.

    `cut_forward` gives the running forward where it may have other rows or entries than the host thinks.
    """
    flash = is_flash(adapter)
    undo.before(adapter.language_model, functools.partial(_check_unchanged, adapter, flash))
    if flash:
        for layer in adapter.layers:
            undo.before(layer, functools.partial(_without_positions, cut_forward), with_kwargs=True)


def is_flash(adapter: Adapter) -> bool:
    """Whether the decoder runs with some version of flash attention."""
    return (names.attention_of(adapter.text_config) or "").startswith("flash")


def _check_unchanged(adapter: Adapter, flash: bool, module: nn.Module, args: Any) -> None:
    if flash != is_flash(adapter):
        raise StateError(
            f"the attention of the model became {names.attention_of(adapter.text_config)!r} after it was patched. "
            "Call handle.remove(), set the attention, and patch again."
        )


def _without_positions(
    cut_forward: Callable[[], object | None], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> Any:
    return None if cut_forward() is None else (args, {**kwargs, names.POSITION_IDS: None})
