"""The LLM's exit: hidden states of full length again, and what each layer holds noted on the KV cache.

A dropped place repeats the last kept place before it, so logits and labels of the host still line up.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.host import contract, names
from vtc.engine.host.override import Undo
from vtc.engine.llm import sizes, unmerge
from vtc.engine.llm.evict import evict
from vtc.engine.llm.forward import FORWARD, Forward
from vtc.engine.llm.held import Held, Memory
from vtc.engine.llm.logical import remember
from vtc.engine.llm.rows import Rows
from vtc.engine.plan import Plan
from vtc.errors import StateError
from vtc.indices import invert, shift, take

Record = Callable[[Forward], None]


def attach(adapter: Adapter, plan: Plan, record: Record, undo: Undo) -> None:
    """Hook the language model; what takes the hook off again goes to `undo`, what the call did to `record`."""
    undo.after(adapter.language_model, functools.partial(_restore, adapter, plan, record), with_kwargs=True)


def _restore(
    adapter: Adapter, plan: Plan, record: Record, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    """Hook of the language model: full-length hidden states, and the cache's memory."""
    state = FORWARD.get()
    word, given = names.find_cache(module, kwargs)
    cache = names.cache_of(output)
    if state is not None and not word and (state.visual is not None or cache is not None):
        raise StateError(
            f"{type(module).__name__} was called without a KV cache by a word that vtc knows "
            f"({' or '.join(names.CACHE_WORDS)}), so what was dropped could not be noted on it and every later token "
            f"would be wrong. {contract.REPORT_IT}"
        )
    if state is None or state.rows is None or state.visual is None:
        return None
    record(state)
    if state.unmerging is not None:
        return unmerge.restore(output)
    cache = given if cache is None else cache
    # frozen and parked tokens change what single layers hold, though every row is back here
    rows = state.rows
    shortened = rows.column is not None or any(seen.column is not None for seen in state.seen.values())
    shortened = shortened or (plan.size_bias and not state.visual.token_map.is_selection)
    if cache is not None and shortened:
        remember(cache, evict(cache, plan, state, _written(adapter, plan, state)))
    if rows.column is None:
        return None
    keep = invert(rows.column, rows.prompt.length) >= 0
    padding = (rows.column < 0).sum(1, keepdim=True)
    # every column reads the row of the last kept column at or before it
    return names.with_last_hidden(output, take(output[0], keep.long().cumsum(1) - 1 + padding))


def _written(adapter: Adapter, plan: Plan, state: Forward) -> Memory:
    """What each layer holds after this call."""
    assert state.prompt is not None and state.door is not None
    memory = state.prompt.memory
    made: dict[tuple[int, int], Held] = {}
    layers = []
    for index in range(len(adapter.layers)):
        seen = state.seen.get(index, state.door)
        key = id(seen), id(None if memory is None else memory.layers[index])
        if key not in made:
            made[key] = _joined(state, index, seen)
        layers.append(made[key])
    return Memory(plan, state.prompt.past + state.prompt.length, tuple(layers), state.shift)


def _joined(state: Forward, index: int, seen: Rows) -> Held:
    """The entries of layer `index` before this call, followed by its new ones."""
    prompt = seen.prompt
    before = prompt.before(index)
    held = prompt.arange(prompt.past) if before is None else before.columns
    column = torch.cat([held, shift(seen.columns, prompt.past)], dim=1)
    ragged = seen.ragged or (before is not None and before.ragged)
    return Held(
        column, _places(seen, before), ragged, _shift(state, seen, before), sizes.of_layer(state.plan, index, seen)
    )


def _places(seen: Rows, before: Held | None) -> Tensor | None:
    """Where the entries stand among those of the reference layer; None: they are the same."""
    is_whole = seen.place is None and (before is None or before.place is None)
    return None if is_whole else seen.entries(before)


def _shift(state: Forward, seen: Rows, before: Held | None) -> Tensor | None:
    """How far the layer moves the positions of tokens that come later, beyond what the door moves them."""
    if state.plan.positions != "renumber":
        return None
    held = None if before is None else before.shift
    if seen.place is None:
        return held
    assert state.door is not None
    gone = state.door.valid.sum(1) - seen.valid.sum(1)
    return gone if held is None else gone + held
