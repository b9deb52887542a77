"""Eviction: after the prefill, earlier layers keep in their caches only what a later stage kept."""

from dataclasses import replace
from typing import Any

import torch

from vtc.engine.host import cache as host
from vtc.engine.llm.forward import Forward, LayerState, inverse_columns, lookup
from vtc.engine.llm.held import Held, Memory
from vtc.engine.plan import Plan, layer_of


def evict(cache: Any, plan: Plan, state: Forward, memory: Memory) -> Memory:
    """Cut the caches that the steps of `plan` name, in place; the memory of what is left."""
    layers = list(memory.layers)
    for step in plan.steps:
        if step.stage.evict is None:
            continue
        last = layer_of(step)
        for index in range(int(step.stage.evict), last):
            layers[index] = _cut(cache, state, index, state.layer_state[last], layers[index])
    reference = layers[plan.reference]
    if reference is not memory.reference or plan.reference in plan.frozen:
        # places are counted among the entries of this layer, which are others now, or in another order
        where = inverse_columns(reference.column, memory.length)
        layers = [replace(held, place=None if held is reference else lookup(where, held.column)) for held in layers]
    return replace(memory, layers=tuple(layers))


def held_after_prefill(plan: Plan, per_layer: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Visual tokens of each sample in the cache of each layer, from those that each layer saw."""
    held = list(per_layer)
    for step in plan.steps:
        if step.stage.evict is not None:
            last = layer_of(step)
            held[int(step.stage.evict) : last] = [per_layer[last]] * (last - int(step.stage.evict))
    return tuple(held)


def _cut(cache: Any, state: Forward, index: int, kept: LayerState, held: Held) -> Held:
    """Of one layer, the entries of earlier calls and those at the columns of `kept`."""
    before = state.held if state.memory is None else state.memory.column(index, state.dense).shape[1]
    column = state.columns() if kept.column is None else kept.column
    logical = torch.where(column < 0, -1, column + state.past)
    where = lookup(inverse_columns(held.column, state.past + state.length), logical)
    chosen = torch.cat([state.arange(before), where], dim=1)
    host.select(cache, index, chosen)
    place = None if held.place is None else lookup(held.place, chosen)
    bias = None if held.bias is None else held.bias.gather(1, chosen.clamp(min=0))
    ragged = kept.ragged or held.ragged
    return Held(lookup(held.column, chosen), chosen if place is None else place, ragged, held.shift, bias)
