"""Decoder layers: `layer[k]` stages, and the arguments that later layers need once something was dropped.

A stage at layer k sees the hidden states that enter layer k; `vtc.engine.llm.signals` gives its signals.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.decide import stopwatch
from vtc.engine.host import contract, masks, names
from vtc.engine.host.halves import silence, silenced
from vtc.engine.host.override import Undo
from vtc.engine.llm import freeze
from vtc.engine.llm import signals as layer_signals
from vtc.engine.llm import sizes as size_bias
from vtc.engine.llm.forward import FORWARD, Forward, LayerState, cut_forward, lookup, take
from vtc.engine.llm.held import Held
from vtc.engine.plan import Plan, Step, layer_of
from vtc.engine.refusals import check_biased
from vtc.errors import SpecError, StateError


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Hook the decoder layers that a stage acts on or after; what takes the hooks off again goes to `undo`."""
    undo.before(adapter.layers[0], _check_handed_on, with_kwargs=True)
    if not plan.layers and not plan.size_bias:
        return
    evicted = [int(step.stage.evict) for step in plan.steps if step.stage.evict is not None]
    first = 0 if plan.size_bias else min((plan.layers[0], *evicted))
    for index in range(first, len(adapter.layers)):
        hook = functools.partial(_enter_layer, adapter, plan, index)
        undo.before(adapter.layers[index], hook, with_kwargs=True)
    for index in sorted({layer_of(step) - 1 for step in plan.steps if step.stage.before_mlp}):
        attention, mlp = adapter.projections(index)[0], adapter.layer_mlp(index)
        undo.override(attention, functools.partial(silenced, attention, True))
        undo.override(mlp, functools.partial(silenced, mlp, False))
        run = functools.partial(_run_halves, adapter, plan, index, attention, mlp)
        undo.override(adapter.layers[index], run)
    for index in plan.frozen:
        undo.after(adapter.layers[index], functools.partial(freeze.leave, index))
    # after the hooks above, so that what is captured is already cut
    layer_signals.attach(adapter, plan, undo)


def _check_handed_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of the first decoder layer: it must get what the door made, and the KV cache by a word that we know.

    Raises:
        StateError: it gets something else.
    """
    state = cut_forward()
    if state is None:
        return
    found, cache = names.find_cache(module, kwargs)
    if state.cache is not None and (not found or cache is not state.cache):
        raise StateError(
            f"{type(module).__name__} did not get the KV cache by a word that vtc knows "
            f"({' or '.join(names.CACHE_WORDS)}), but the arguments {', '.join(sorted(kwargs))}. {contract.REPORT_IT}"
        )
    rows, angles = names.hidden_argument(args, kwargs).shape[1], kwargs[names.POSITION_EMBEDDINGS][0].shape[-2]
    if rows != state.rows or angles != state.rows:
        raise StateError(
            f"{type(module).__name__} got {rows} tokens and rotations for {angles}, and {state.rows} went in at the "
            f"door. {contract.REPORT_IT}"
        )


def _enter_layer(adapter: Adapter, plan: Plan, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of decoder layer `index`."""
    state = cut_forward()
    if state is None:
        return None
    hidden = names.hidden_argument(args, kwargs)
    if state.parked is not None and state.parked.until == index:
        hidden = state.restore(hidden)
        _note_lengths(state, index)
    steps = plan.at("layer", index) if state.visual is not None else ()
    for step in steps:
        if step.stage.leave != "freeze" and not step.stage.before_mlp:
            own = functools.partial(_own_arguments, adapter, plan, state, index, hidden, kwargs)
            hidden = _run(adapter, step, index, state, hidden, own)
    cut = {**kwargs, **_arguments(adapter, plan, state, index, hidden, kwargs)}
    state.layer_state[index] = _layer_state(plan, state, index)
    for step in steps:
        if step.stage.leave == "freeze":
            hidden, cut = freeze.enter(adapter, step, index, state, hidden, cut)
    return names.with_hidden_argument(args, cut, hidden)


def _run_halves(
    adapter: Adapter,
    plan: Plan,
    index: int,
    attention: nn.Module,
    mlp: nn.Module,
    original: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The `forward` of layer `index` with the steps of the next one between its attention and its MLP."""
    state = FORWARD.get()
    if state is None or state.visual is None or not any(state.visual.lengths):
        return original(hidden, *args, **kwargs)
    with silence(mlp):
        output = original(hidden, *args, **kwargs)
    hidden = names.first_of(output)
    for step in plan.at("layer", index + 1):
        if step.stage.before_mlp:
            # nothing of the next layer is read, which the plan has checked
            hidden = _run(adapter, step, index + 1, state, hidden, dict)
    with silence(attention):
        return original(hidden, *args, **kwargs)


def _own_arguments(
    adapter: Adapter, plan: Plan, state: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What layer `index` would get if no stage acted before it."""
    return {**kwargs, **_arguments(adapter, plan, state, index, hidden, kwargs)}


def _run(
    adapter: Adapter, step: Step, index: int, state: Forward, hidden: Tensor, own: layer_signals.Arguments
) -> Tensor:
    before = state.visual
    assert before is not None
    if not any(before.lengths):
        return hidden  # an earlier stage dropped everything
    with stopwatch(hidden.device) as watch:
        visual = before.pooled() if step.stage.pool == "sample" else before
        signals = layer_signals.collect(adapter, step, index, state, visual, hidden, own)
        tokens = visual.tokens(hidden, step.budget, signals, state.row_of, step.stage.schedule)
        parks = step.stage.leave == "park"
        rows, row_of, current = hidden, state.row_of, before.per_sample(state.batch)
        state.visual, hidden = visual.decide(step, tokens, hidden, state.row_of)
        state.shared.clear()  # sizes may have changed, also where the number has not
        if parks and hidden is not rows:
            raise SpecError(f"{step} merges tokens, but parked ones come back as they were. Use leave='drop'.")
        if state.visual.per_sample(state.batch) != current:
            if parks:
                assert step.stage.until is not None
                state.park(hidden, before, int(step.stage.until))
            state.shorten()
            hidden = take(hidden, lookup(row_of, state.columns()))
            state.place = lookup(state.door_row_of, state.columns())
    state.seconds.append((str(step.stage.site), watch))
    _note_lengths(state, index)
    return hidden


def _note_lengths(state: Forward, index: int) -> None:
    assert state.visual is not None
    state.visual_lengths[index] = state.visual.per_sample(state.batch)


def _arguments(
    adapter: Adapter, plan: Plan, state: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of layer `index`, cut to the rows and entries that it has; empty where nothing changes."""
    before = state.memory.layers[index] if state.memory is not None else None
    is_whole = state.place is None and (before is None or (before.place is None and before.shift is None))
    if is_whole and not plan.size_bias:
        return {}
    # layers of different kinds (sliding window, local RoPE) get different masks and rotations
    key = id(before), id(kwargs.get(names.ATTENTION_MASK)), id(kwargs[names.POSITION_EMBEDDINGS])
    if key in state.shared:
        return state.shared[key]
    bias = size_bias.of_layer(state, index, _layer_state(plan, state, index))
    if is_whole and bias is None:
        return state.shared.setdefault(key, {})
    cut: dict[str, Any] = {}
    place = state.place
    if place is not None:
        cut[names.POSITION_EMBEDDINGS] = tuple(take(part, place) for part in kwargs[names.POSITION_EMBEDDINGS])
        if kwargs.get(names.POSITION_IDS) is not None:
            cut[names.POSITION_IDS] = take(kwargs[names.POSITION_IDS], place, dim=-1)
    if plan.positions == "renumber":
        positions = _renumbered(state, before)
        cut[names.POSITION_EMBEDDINGS] = adapter.rotation(hidden, positions)
        if kwargs.get(names.POSITION_IDS) is not None:
            cut[names.POSITION_IDS] = positions
    held = state.memory.place(index, state.dense) if state.memory is not None else None
    held = state.arange(state.held) if held is None else held
    new = state.arange(state.rows) if place is None else place
    columns = torch.cat([held, torch.where(new < 0, -1, new + state.held)], dim=1)
    mask, implementation = kwargs.get(names.ATTENTION_MASK), names.attention_of(adapter.text_config)
    masks.check_width(mask, state.held + state.door_rows)
    if mask is not None:
        cut[names.ATTENTION_MASK] = masks.cut(mask, place, columns)
    elif bias is not None or state.ragged or (before is not None and before.ragged):
        cut[names.ATTENTION_MASK] = masks.causal(columns >= 0, state.rows, hidden.dtype, implementation)
    if bias is not None:
        check_biased(implementation)
        cut[names.ATTENTION_MASK] = size_bias.added(cut[names.ATTENTION_MASK], bias, hidden.dtype)
    state.shared[key] = cut
    return cut


def _renumbered(state: Forward, before: Held | None) -> Tensor:
    """Positions of the current rows, counted without the tokens that are gone by now."""
    assert state.positions is not None
    positions = state.positions
    if state.place is not None:
        gone = lookup(state.door_rank, state.place.clamp(min=0)) - _rank(state)
        positions = take(positions, state.place, dim=-1) - gone
    return positions if before is None or before.shift is None else positions - before.shift[:, None]


def _rank(state: Forward) -> Tensor:
    """How many tokens stand before each current row."""
    valid = state.valid_rows().long()
    return valid.cumsum(1) - valid


def _layer_state(plan: Plan, state: Forward, index: int) -> LayerState:
    """What layer `index` sees of the new tokens if it runs now."""
    return LayerState(state.column, state.place, state.ragged, _shift(plan, state, index), state.visual)


def _shift(plan: Plan, state: Forward, index: int) -> Tensor | None:
    """How far layer `index` moves the positions of tokens that come later, beyond what the door moves them."""
    if plan.positions != "renumber":
        return None
    before = state.memory.layers[index].shift if state.memory is not None else None
    if state.place is None:
        return before
    assert state.door_valid is not None
    gone = state.door_valid - state.valid_rows().sum(1)
    return gone if before is None else gone + before
