"""Eviction: after the prefill, earlier layers keep in their caches only what a later stage kept."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vtc.engine.llm.forward import Forward
from vtc.engine.llm.held import Memory
from vtc.engine.llm.rows import Rows
from vtc.engine.plan import Plan, layer_of
from vtc.indices import follow, invert, shift


def evict(cache: Any, plan: Plan, state: Forward, memory: Memory) -> Memory:
    """Cut the caches that the steps of `plan` name, in place; the memory of what is left."""
    kept = {}
    for step in plan.steps:
        if step.stage.evicts_from is not None:
            last = state.seen[layer_of(step)]
            for index in range(int(step.stage.evicts_from), layer_of(step)):
                kept[index] = _entries(last, memory, index), last.ragged
    return memory.cut(cache, kept)


def held_after_prefill(plan: Plan, per_layer: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Visual tokens of each sample in the cache of each layer, from those that each layer saw."""
    held = list(per_layer)
    for step in plan.steps:
        if step.stage.evicts_from is not None:
            last = layer_of(step)
            held[int(step.stage.evicts_from) : last] = [per_layer[last]] * (last - int(step.stage.evicts_from))
    return tuple(held)


def _entries(kept: Rows, memory: Memory, index: int) -> Int[Tensor, "B K"]:
    """Of layer `index`, the entries of earlier calls and those of the tokens that are among `kept`."""
    prompt = kept.prompt
    logical = shift(kept.columns, prompt.past)
    where = follow(invert(memory.layers[index].columns, memory.length), logical)
    return torch.cat([prompt.arange(prompt.entries(index)), where], dim=1)
