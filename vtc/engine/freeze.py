"""Frozen layers: visual tokens neither ask nor pass the MLP, but the others still see their keys and values.

The layer runs on the live rows alone. The entries of the frozen tokens are computed here, from the layer's own norm and
projections, and stand in front of the live ones in its cache; so the cache holds them in that order, which the memory
of the cache records, and the mask is cut to.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.forward import FORWARD, Forward, compact_columns, lookup, put, take
from vtc.engine.host import masks
from vtc.engine.host.rotary import rotate
from vtc.engine.plan import Step
from vtc.engine.state import run_step, stopwatch
from vtc.errors import SpecError


class Entries:
    """Stands in for the KV cache of one layer during one call: puts the frozen tokens' entries before the new ones."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self._cache, self._keys, self._values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        if self._cache is None:
            return keys, values
        held: tuple[Tensor, Tensor] = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        return held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def enter(
    adapter: Adapter, step: Step, index: int, state: Forward, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What goes into layer `index` instead of `hidden` and `kwargs`: the live rows and the frozen tokens' entries.

    Raises:
        SpecError: the stage merges tokens.
    """
    visual = state.visual
    assert visual is not None
    with stopwatch(hidden.device) as watch:
        tokens = visual.tokens(hidden, step.budget, {}, state.row_of, step.stage.schedule)
        token_map = run_step(step, tokens)
        if not token_map.is_selection:
            raise SpecError(f"{step} merges tokens, but frozen ones stay what they are. Use leave='drop'.")
        awake = visual.follow(token_map)
        was_visual = visual.is_kept(state.batch, state.length)
        is_frozen = was_visual & ~awake.is_kept(state.batch, state.length)
        column = state.columns()
        frozen_row = is_frozen.gather(1, column.clamp(min=0)) & (column >= 0)
        live_row = state.valid_rows() & ~frozen_row
        counts = [n - m for n, m in zip(visual.per_sample(state.batch), awake.per_sample(state.batch), strict=True)]
        total = state.valid_totals()
        frozen = compact_columns(frozen_row, counts)
        live = compact_columns(live_row, [n - m for n, m in zip(total, counts, strict=True)])
        cos, sin = kwargs["position_embeddings"]
        keys, values = adapter.keys_values(index, take(hidden, frozen))
        keys = rotate(keys, take(cos, frozen), take(sin, frozen)).to(values.dtype)
        order = torch.cat([frozen, live], dim=1)
        cut: dict[str, Any] = {
            "position_embeddings": (take(cos, live), take(sin, live)),
            "attention_mask": _mask(adapter, state, index, kwargs.get("attention_mask"), live, order, hidden.dtype),
            "past_key_values": Entries(kwargs.get("past_key_values"), keys, values),
        }
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = take(kwargs["position_ids"], live, dim=-1)
        before = state.layer_state[index]
        place = order if before.place is None else lookup(before.place, order)
        ragged = len(set(counts)) > 1 or len(set(total)) > 1
        state.layer_state[index] = before._replace(column=lookup(column, order), place=place, ragged=ragged)
        state.live[index] = hidden, live
        state.awake[index] = awake.per_sample(state.batch)
    state.seconds.append((str(step.stage.site), watch))
    return take(hidden, live), {**kwargs, **cut}


def leave(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of a frozen layer: all rows again, the live ones changed."""
    state = FORWARD.get()
    if state is None or index not in state.live:
        return None
    hidden, live = state.live.pop(index)
    if isinstance(output, tuple):
        return (put(hidden, live, output[0]), *output[1:])
    return put(hidden, live, output)


def _mask(
    adapter: Adapter, state: Forward, index: int, mask: Any, live: Tensor, order: Tensor, dtype: torch.dtype
) -> Tensor:
    """[B, 1, live, held + frozen + live] of layer `index`."""
    held = state.held if state.memory is None else state.memory.column(index, state.dense).shape[1]
    columns = torch.cat([state.arange(held), torch.where(order < 0, -1, order + held)], dim=1)
    if mask is not None:
        return masks.cut(mask, live, columns)
    # no mask: plain causal over the rows, every one of them a token
    allowed = (columns[:, None] <= live[:, :, None] + held) & (columns[:, None] >= 0)
    if adapter.text_config._attn_implementation == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=live.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )[:, None]
    return allowed[:, None]
