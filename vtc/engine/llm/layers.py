"""Decoder layers: `layer[k]` stages, and the arguments that later layers need once something was dropped.

A stage at layer k sees the hidden states that enter layer k; `vtc.engine.llm.signals` gives its signals.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.decide import stopwatch
from vtc.engine.host import contract, masks, names
from vtc.engine.host.halves import silence, silenced
from vtc.engine.host.override import Undo
from vtc.engine.llm import freeze, sizes
from vtc.engine.llm import signals as llm_signals
from vtc.engine.llm.forward import Forward, Parked, compressed_forward, cut_forward
from vtc.engine.llm.held import Held
from vtc.engine.llm.rows import Rows
from vtc.engine.llm.source import Arguments
from vtc.engine.plan import Plan, Step, layer_of
from vtc.engine.refusals import check_biased
from vtc.errors import SpecError, StateError
from vtc.indices import take, take_positions


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Hook the decoder layers that a stage acts on or after; what takes the hooks off again goes to `undo`."""
    undo.before(adapter.layers[0], _check_handed_on, with_kwargs=True)
    if not plan.layers and not plan.size_bias:
        return
    evicted = [int(step.stage.evicts_from) for step in plan.steps if step.stage.evicts_from is not None]
    first = 0 if plan.size_bias else min((plan.layers[0], *evicted))
    for index in range(first, len(adapter.layers)):
        hook = functools.partial(_enter_layer, adapter, plan, index)
        undo.before(adapter.layers[index], hook, with_kwargs=True)
    for index in sorted({layer_of(step) - 1 for step in plan.steps if step.stage.site.before_mlp}):
        attention, mlp = adapter.projections(index)[0], adapter.layer_mlp(index)
        undo.override(attention, functools.partial(silenced, attention, True))
        undo.override(mlp, functools.partial(silenced, mlp, False))
        run = functools.partial(_run_halves, adapter, plan, index, attention, mlp)
        undo.override(adapter.layers[index], run)
    for index in plan.frozen:
        undo.after(adapter.layers[index], functools.partial(freeze.leave, index))
    # after the hooks above, so that what is captured is already cut
    llm_signals.attach(adapter, plan, undo)


def _check_handed_on(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of the first decoder layer: it must get what the door made, and the KV cache by a word that we know.

    Raises:
        StateError: it gets something else.
    """
    state = cut_forward()
    if state is None or state.rows is None:
        return
    made = state.rows.prompt.cache
    found, cache = names.find_cache(module, kwargs)
    if made is not None and (not found or cache is not made):
        raise StateError(
            f"{type(module).__name__} did not get the KV cache by a word that vtc knows "
            f"({' or '.join(names.CACHE_WORDS)}), but the arguments {', '.join(sorted(kwargs))}. {contract.REPORT_IT}"
        )
    rows, angles = names.hidden_argument(args, kwargs).shape[1], kwargs[names.POSITION_EMBEDDINGS][0].shape[-2]
    if rows != state.rows.count or angles != state.rows.count:
        raise StateError(
            f"{type(module).__name__} got {rows} tokens and rotations for {angles}, and {state.rows.count} went in at "
            f"the door. {contract.REPORT_IT}"
        )


def _enter_layer(adapter: Adapter, plan: Plan, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of decoder layer `index`."""
    state = cut_forward()
    if state is None or state.rows is None:
        return None
    hidden = names.hidden_argument(args, kwargs)
    if state.parked is not None and state.parked.until == index:
        hidden = state.unpark(hidden)
        state.note_lengths(index)
    steps = plan.at("layer", index) if state.visual is not None else ()
    for step in steps:
        if not step.stage.freezes and not step.stage.site.before_mlp:
            own = functools.partial(_own_arguments, adapter, plan, state, index, hidden, kwargs)
            hidden = _run(adapter, step, index, state, hidden, own)
    cut = {**kwargs, **_arguments(adapter, plan, state, index, hidden, kwargs)}
    state.seen[index] = state.rows
    for step in steps:
        if step.stage.freezes:
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
    state = compressed_forward()
    if state is None or state.visual is None or not any(state.visual.lengths):
        return original(hidden, *args, **kwargs)
    with silence(mlp):
        output = original(hidden, *args, **kwargs)
    hidden = names.first_of(output)
    for step in plan.at("layer", index + 1):
        if step.stage.site.before_mlp:
            # nothing of the next layer is read, which the plan has checked
            hidden = _run(adapter, step, index + 1, state, hidden, dict)
    with silence(attention):
        return original(hidden, *args, **kwargs)


def _own_arguments(
    adapter: Adapter, plan: Plan, state: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What layer `index` would get if no stage acted before it."""
    return {**kwargs, **_arguments(adapter, plan, state, index, hidden, kwargs)}


def _run(adapter: Adapter, step: Step, index: int, state: Forward, hidden: Tensor, own: Arguments) -> Tensor:
    rows, door = state.rows, state.door
    assert rows is not None and rows.visual is not None and door is not None
    if not any(rows.visual.lengths):
        return hidden  # an earlier stage dropped everything
    with stopwatch(hidden.device) as watch:
        visual = rows.visual.pooled() if step.stage.pool == "sample" else rows.visual
        moment = llm_signals.Moment(adapter, state, rows, visual, state.embeds, hidden, index, own)
        signals = llm_signals.collect(step, moment)
        tokens = visual.tokens(hidden, step.budget, signals, rows.row_of, step.stage.count)
        left, merged = visual.decide(step, tokens, hidden, rows.row_of)
        until = step.stage.parks_until
        if until is not None and merged is not hidden:
            raise SpecError(f"{step} merges tokens, but parked ones come back as they were. Use leave=Drop().")
        after, hidden = rows.with_visual(left), merged
        if left.per_sample(rows.prompt.batch) != rows.visual.per_sample(rows.prompt.batch):
            if until is not None:
                state.parked = Parked(int(until), hidden, rows)
            after = after.cut(door)
            hidden = take(hidden, after.within(rows))
        state.go_on(after)  # sizes may have changed, also where the number has not
    state.seconds.append((str(step.stage.site), watch))
    state.note_lengths(index)
    return hidden


def _arguments(
    adapter: Adapter, plan: Plan, state: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of layer `index`, cut to the rows and entries that it has; empty where nothing changes."""
    rows = state.rows
    assert rows is not None
    prompt, place = rows.prompt, rows.place
    before = prompt.before(index)
    is_whole = place is None and (before is None or (before.place is None and before.shift is None))
    if is_whole and not plan.size_bias:
        return {}
    # layers of different kinds (sliding window, local RoPE) get different masks and rotations
    key = id(before), id(kwargs.get(names.ATTENTION_MASK)), id(kwargs[names.POSITION_EMBEDDINGS])
    if key in state.shared:
        return state.shared[key]
    bias = sizes.of_layer(plan, index, rows)
    if is_whole and bias is None:
        return state.shared.setdefault(key, {})
    cut: dict[str, Any] = {}
    if place is not None:
        cut[names.POSITION_EMBEDDINGS] = tuple(take(part, place) for part in kwargs[names.POSITION_EMBEDDINGS])
        if kwargs.get(names.POSITION_IDS) is not None:
            cut[names.POSITION_IDS] = take_positions(kwargs[names.POSITION_IDS], place)
    if plan.positions == "renumber":
        positions = _renumbered(state, rows, before)
        cut[names.POSITION_EMBEDDINGS] = adapter.rotation(hidden, positions)
        if kwargs.get(names.POSITION_IDS) is not None:
            cut[names.POSITION_IDS] = positions
    assert state.door is not None
    mask, implementation = kwargs.get(names.ATTENTION_MASK), names.attention_of(adapter.text_config)
    masks.check_width(mask, prompt.held + state.door.count)
    columns = rows.entries(before)
    if mask is not None:
        cut[names.ATTENTION_MASK] = masks.cut(mask, place, columns)
    elif bias is not None or rows.ragged or (before is not None and before.ragged):
        cut[names.ATTENTION_MASK] = masks.causal(columns >= 0, rows.count, hidden.dtype, implementation)
    if bias is not None:
        check_biased(implementation)
        cut[names.ATTENTION_MASK] = sizes.added(cut[names.ATTENTION_MASK], bias, hidden.dtype)
    state.shared[key] = cut
    return cut


def _renumbered(state: Forward, rows: Rows, before: Held | None) -> Tensor:
    """Positions of the current rows, counted without the tokens that are gone by now."""
    assert state.positions is not None and state.door is not None
    positions = state.positions
    if rows.place is not None:
        gone = take(state.door.rank, rows.place) - rows.rank
        positions = take_positions(positions, rows.place) - gone
    return positions if before is None or before.shift is None else positions - before.shift[:, None]
