"""Frozen layers: visual tokens neither ask nor pass the MLP, but the others still see their keys and values.

The layer runs on the live rows alone. The entries of the frozen tokens are computed here, from the layer's own norm and
projections, and stand in front of the live ones in its cache; so the cache holds them in that order, which the memory
of the cache records, and the mask is cut to.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.decide import run_step, stopwatch
from vtc.engine.host import masks, names
from vtc.engine.host.cache import Prepended
from vtc.engine.host.rotary import rotate
from vtc.engine.llm.forward import FORWARD, Forward
from vtc.engine.llm.rows import Rows
from vtc.engine.plan import Step
from vtc.errors import SpecError
from vtc.indices import compact, put, shift, take, take_positions


def enter(
    adapter: Adapter, step: Step, index: int, state: Forward, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What goes into layer `index` instead of `hidden` and `kwargs`: the live rows and the frozen tokens' entries.

    Raises:
        SpecError: the stage merges tokens.
    """
    rows = state.rows
    assert rows is not None and rows.visual is not None
    visual, batch, length = rows.visual, rows.prompt.batch, rows.prompt.length
    with stopwatch(hidden.device) as watch:
        tokens = visual.tokens(hidden, step.budget, {}, rows.row_of, step.stage.count)
        token_map = run_step(step, tokens)
        if not token_map.is_selection:
            raise SpecError(f"{step} merges tokens, but frozen ones stay what they are. Use leave=Drop().")
        awake = visual.follow(token_map)
        is_frozen = visual.is_kept(batch, length) & ~awake.is_kept(batch, length)
        frozen_row = take(is_frozen, rows.columns) & (rows.columns >= 0)
        live_row = rows.valid & ~frozen_row
        counts = [n - m for n, m in zip(visual.per_sample(batch), awake.per_sample(batch), strict=True)]
        total = rows.totals
        frozen = compact(frozen_row, counts)
        live = compact(live_row, [n - m for n, m in zip(total, counts, strict=True)])
        cos, sin = kwargs[names.POSITION_EMBEDDINGS]
        keys, values = adapter.keys_values(index, take(hidden, frozen))
        keys = rotate(keys, take(cos, frozen), take(sin, frozen)).to(values.dtype)
        order = torch.cat([frozen, live], dim=1)
        layer, mask = adapter.layers[index], kwargs.get(names.ATTENTION_MASK)
        word, cache = names.find_cache(layer, kwargs)
        cut: dict[str, Any] = {
            names.POSITION_EMBEDDINGS: (take(cos, live), take(sin, live)),
            names.ATTENTION_MASK: _mask(adapter, rows, index, mask, live, order, hidden.dtype),
            word or names.cache_words(layer)[0]: Prepended(cache, keys, values),
        }
        if kwargs.get(names.POSITION_IDS) is not None:
            cut[names.POSITION_IDS] = take_positions(kwargs[names.POSITION_IDS], live)
        state.seen[index] = rows.ordered(order, ragged=len(set(counts)) > 1 or len(set(total)) > 1)
        state.live[index] = hidden, live
        state.awake[index] = awake.per_sample(batch)
    state.seconds.append((str(step.stage.site), watch))
    return take(hidden, live), {**kwargs, **cut}


def leave(index: int, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of a frozen layer: all rows again, the live ones changed."""
    state = FORWARD.get()
    if state is None or index not in state.live:
        return None
    hidden, live = state.live.pop(index)
    return names.with_first(output, put(hidden, live, names.first_of(output)))


def _mask(
    adapter: Adapter, rows: Rows, index: int, mask: Any, live: Tensor, order: Tensor, dtype: torch.dtype
) -> Tensor:
    """[B, 1, live, held + frozen + live] of layer `index`."""
    prompt = rows.prompt
    held = prompt.entries(index)
    columns = torch.cat([prompt.arange(held), shift(order, held)], dim=1)
    masks.check_width(mask, held + rows.count)
    if mask is not None:
        return masks.cut(mask, live, columns)
    # no mask: plain causal over the rows, every one of them a token
    allowed = (columns[:, None] <= live[:, :, None] + held) & (columns[:, None] >= 0)
    if names.attention_of(adapter.text_config) == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=live.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )[:, None]
    return allowed[:, None]
