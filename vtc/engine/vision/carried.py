"""Signals of the encoder that stages at `llm_in` and in decoder layers read; they ride on the encoder's output."""

import torch
from torch import Tensor

from vtc.adapter import Adapter, Packing
from vtc.engine.plan import Plan
from vtc.engine.vision.call import EncodeState
from vtc.engine.vision.signals import READERS, Reading


def of_images(adapter: Adapter, plan: Plan, state: EncodeState) -> dict[tuple[str, int], Tensor]:
    """What is carried of one encoder call: [images, slots] or [images, slots, E] by signal and layer."""
    found: dict[tuple[str, int], Tensor] = {}
    for one in plan.carried:
        if one.name not in READERS or state.encoder.lacks(one.name, one.layer) is not None:
            continue  # it is not of images, or not of these
        value = READERS[one.name](Reading(state, one, companion=plan.companion))
        if state.decided is not None:  # of a smaller grid
            value = _at(state.decided.anchor, value, state.decided.num_tokens)
        found[one.name, one.layer] = _slots(value, adapter.packing(state.encoder, state.arguments))
    return found


def _slots(value: Tensor, packing: Packing | None) -> Tensor:
    """[groups, tokens, ...] of the host's groups as [images, slots, ...]."""
    if packing is None:
        return value
    width = max(packing.lengths)
    slot = packing.slot.to(value.device)
    image = torch.tensor(packing.image, device=value.device)[:, None]
    return _at(slot, value, width, image, len(packing.lengths))


def _at(place: Tensor, value: Tensor, width: int, row: Tensor | None = None, rows: int | None = None) -> Tensor:
    """[rows, width, ...] with `value` at its places, zeros elsewhere; place -1 is nowhere."""
    if row is None:
        row = torch.arange(len(value), device=value.device)[:, None]
    out = value.new_zeros(rows or len(value), width + 1, *value.shape[2:])
    return out.index_put((row, torch.where(place < 0, width, place)), value)[:, :width]
