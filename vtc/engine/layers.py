"""Decoder layers: `layer[k]` stages, and the arguments that later layers need once something was dropped.

A stage at layer k sees the hidden states that enter layer k. Its attention signals come from layer k-1 of the same
forward: queries and keys are captured before RoPE, rotated here, and only the rows that are asked for are computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine import masks
from vtc.engine.door import apply_step
from vtc.engine.forward import FORWARD, Forward, lookup, take
from vtc.engine.plan import Plan, Step
from vtc.engine.rotary import rotate
from vtc.engine.state import stopwatch
from vtc.engine.visual import Visual
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import attention_rows, received_attention
from vtc.stages import Signal

Undo = Callable[[], None]
ATTENTION_SIGNALS = ("query_attention", "keys", "text_keys")


def attach(adapter: Adapter, plan: Plan, undo: list[Undo]) -> None:
    """Hook the decoder layers that a stage acts on or after; what takes the hooks off again goes to `undo`."""
    if not plan.layers:
        return
    for index in range(plan.layers[0], len(adapter.layers)):
        hook = functools.partial(_enter_layer, adapter, plan, index)
        undo.append(adapter.layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
    # after the hooks above, so that what is captured is already cut
    sources = {
        _source(index, signal)
        for index in plan.layers
        for signal in plan.signals("layer", index)
        if signal.name in ATTENTION_SIGNALS
    }
    for index in sorted(sources):
        attention = adapter.layer_attention(index)
        undo += [
            attention.query.register_forward_hook(functools.partial(_capture, index, "query")).remove,
            attention.key.register_forward_hook(functools.partial(_capture, index, "key")).remove,
            adapter.layers[index]
            .register_forward_pre_hook(functools.partial(_capture_rotation, index), with_kwargs=True)
            .remove,
        ]


def _source(index: int, signal: Signal) -> int:
    """The layer whose attention a signal of a stage at layer `index` describes."""
    return index - 1 + signal.layer


def _capture(index: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    state = FORWARD.get()
    if state is not None and state.visual is not None:
        state.captured[index, name] = output


def _capture_rotation(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    state = FORWARD.get()
    if state is not None and state.visual is not None:
        state.captured[index, "cos"], state.captured[index, "sin"] = kwargs["position_embeddings"]


def _enter_layer(adapter: Adapter, plan: Plan, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of decoder layer `index`."""
    state = FORWARD.get()
    if state is None or (state.visual is None and state.memory is None):
        return None
    hidden = args[0]
    steps = plan.at("layer", index) if state.visual is not None else ()
    if steps:
        row_of = state.row_of
        for step in steps:
            hidden = _run(adapter, step, index, state, hidden)
        assert state.visual is not None
        if state.visual.per_sample(state.batch) != _current(state):
            state.shorten()
            hidden = take(hidden, lookup(row_of, state.columns()))
            state.place = lookup(state.door_row_of, state.columns())
        state.visual_lengths[index] = state.visual.per_sample(state.batch)
    state.layer_state[index] = (state.column, state.place, state.ragged)
    return (hidden, *args[1:]), {**kwargs, **_arguments(adapter, state, index, hidden, kwargs)}


def _current(state: Forward) -> list[int]:
    """Visual tokens per sample before the stages of this layer."""
    return state.visual_lengths[max(state.visual_lengths)]


def _run(adapter: Adapter, step: Step, index: int, state: Forward, hidden: Tensor) -> Tensor:
    assert state.visual is not None
    with stopwatch(hidden.device) as watch:
        visual = state.visual.pooled() if step.stage.pool == "sample" else state.visual
        signals = _signals(adapter, step, index, state, visual, hidden)
        tokens = visual.tokens(hidden, step.budget, signals, state.row_of)
        state.visual, hidden = apply_step(step, visual, tokens, state, hidden)
    state.seconds.append((str(step.stage.site), watch))
    return hidden


def _arguments(adapter: Adapter, state: Forward, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of layer `index`, cut to the rows and entries that it has; empty where nothing changes."""
    before = state.memory.layers[index] if state.memory is not None else None
    if state.place is None and (before is None or before.place is None):
        return {}
    # layers of different kinds (sliding window, local RoPE) get different masks and rotations
    key = id(before), id(kwargs.get("attention_mask")), id(kwargs["position_embeddings"])
    if key in state.shared:
        return state.shared[key]
    cut: dict[str, Any] = {}
    place = state.place
    if place is not None:
        cut["position_embeddings"] = tuple(take(part, place) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = take(kwargs["position_ids"], place, dim=-1)
    held = state.memory.place(index, state.dense) if state.memory is not None else None
    held = state.arange(state.held) if held is None else held
    new = state.arange(state.rows) if place is None else place
    columns = torch.cat([held, torch.where(new < 0, -1, new + state.held)], dim=1)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        cut["attention_mask"] = masks.cut(mask, place, columns)
    elif state.ragged or (before is not None and before.ragged):
        implementation = adapter.text_config._attn_implementation
        cut["attention_mask"] = masks.causal(columns >= 0, state.rows, hidden.dtype, implementation)
    state.shared[key] = cut
    return cut


def _signals(
    adapter: Adapter, step: Step, index: int, state: Forward, visual: Visual, hidden: Tensor
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    rows, sample = visual.rows(state.row_of), visual.sample_index
    names = {signal.name for signal in step.stage.signals}
    if "position" in names:
        found["position"] = torch.where(visual.column < 0, -1, visual.column + state.past)
    if "normed_states" in names:
        found["normed_states"] = adapter.final_norm(visual.gather(hidden, state.row_of))
    text: Tensor | None = None
    if any(name.startswith("text_") for name in names):
        text, is_text = _text_rows(state, visual)
        found["text_mask"] = is_text[sample]
        found["text_after"] = text[sample] > rows.max(dim=1, keepdim=True).values
        found["text_position"] = lookup(state.columns(), text)[sample] + state.past
        if "text_states" in names:
            found["text_states"] = adapter.final_norm(take(hidden, text))[sample]
    for signal in step.stage.signals:
        if signal.name not in ATTENTION_SIGNALS:
            continue
        source = _source(index, signal)
        if signal.name == "query_attention":
            attention = _query_attention(adapter, state, source, signal.rows)
            found["query_attention"] = attention[sample[:, None], rows.clamp(min=0)]
        else:
            keys = _rotated(adapter, state, source, "key")
            wanted = rows.clamp(min=0) if signal.name == "keys" else text[sample]  # type: ignore[index]
            wanted = wanted[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            found[signal.name] = keys[sample].gather(2, wanted)
    return found


def _text_rows(state: Forward, visual: Visual) -> tuple[Tensor, Tensor]:
    """Rows of the text tokens, in order, and which of them are valid; the width holds the longest text."""
    assert state.is_visual is not None
    column = state.columns()
    is_text = state.valid_rows() & ~state.is_visual.gather(1, column.clamp(min=0))
    width = state.length - min(visual.per_sample(state.batch, [sum(images) for images in visual.origin]))
    order = (~is_text).long().argsort(dim=1, stable=True)[:, :width]
    return order, is_text.gather(1, order)


def _rotated(adapter: Adapter, state: Forward, source: int, name: str) -> Tensor:
    attention = adapter.layer_attention(source)
    split = attention.split_queries if name == "query" else attention.split_keys
    return rotate(split(state.captured[source, name]), state.captured[source, "cos"], state.captured[source, "sin"])


def _query_attention(adapter: Adapter, state: Forward, source: int, rows: str) -> Float[Tensor, "B R"]:
    """What the query rows give each current row at layer `source`, mean over heads (and rows)."""
    scale = adapter.layer_attention(source).scale
    queries, keys = _rotated(adapter, state, source, "query"), _rotated(adapter, state, source, "key")
    valid = state.valid_rows()
    if rows == "mean":
        if state.held:
            raise UnsupportedFeatureError(
                "query rows 'mean' need every query of the prompt, but part of it is in the cache. "
                "Use query='last', or start without a cache."
            )
        segments = torch.where(valid, 0, -1)
        return received_attention(queries, keys, segments=segments, causal=True, scale=scale)
    if state.held:
        keys = state.cache.layers[source].keys
        column = state.memory.column(source, state.dense) if state.memory is not None else state.arange(state.past)
        past = column >= 0
        if state.past_valid is not None:
            past = past & state.past_valid.gather(1, column.clamp(min=0))
        valid = torch.cat([past, valid], dim=1)
    here = valid[:, -queries.shape[2] :]
    last = (here * torch.arange(1, here.shape[1] + 1, device=here.device)).argmax(dim=1)
    row = queries.gather(2, last[:, None, None, None].expand(-1, queries.shape[1], 1, queries.shape[3]))
    attention = attention_rows(row, keys, mask=valid, scale=scale)
    return attention[:, 0, -queries.shape[2] :]
