"""Flash attention: gaps in position ids must not reach it.

Given one prompt, several queries and no mask, transformers reads position ids that do not grow by one as sequences
packed behind each other, and takes the lengths of the keys from them. Rotations are made before the layers run, so
their position ids are left out.
"""

import functools
from typing import Any

from torch import nn

from vtc.adapter import Adapter
from vtc.engine.door import Undo
from vtc.engine.forward import FORWARD
from vtc.errors import StateError


def attach(adapter: Adapter, undo: list[Undo]) -> None:
    """Hook every decoder layer of a model with flash attention; what takes the hooks off again goes to `undo`."""
    flash = is_flash(adapter)
    check = functools.partial(_check_unchanged, adapter, flash)
    undo.append(adapter.language_model.register_forward_pre_hook(check).remove)
    if flash:
        undo += [
            layer.register_forward_pre_hook(_without_positions, with_kwargs=True).remove for layer in adapter.layers
        ]


def is_flash(adapter: Adapter) -> bool:
    """Whether the decoder runs with some version of flash attention."""
    return (adapter.text_config._attn_implementation or "").startswith("flash")


def _check_unchanged(adapter: Adapter, flash: bool, module: nn.Module, args: Any) -> None:
    if flash != is_flash(adapter):
        raise StateError(
            f"the attention of the model became {adapter.text_config._attn_implementation!r} after it was patched. "
            "Call handle.remove(), set the attention, and patch again."
        )


def _without_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    state = FORWARD.get()
    if state is None or (state.visual is None and state.memory is None):
        return None
    return args, {**kwargs, "position_ids": None}
