"""`size_bias`: log(size) of merged tokens on the attention logits of their keys, layer by layer.

A merged token stands for several, and log(size) lets it weigh as much as they did. Sizes are those at the layer: what
the tower, the door and the stages up to this layer merged. Layers before a merge keep their own, in the caches too.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.engine.llm.forward import Forward, LayerState
from vtc.engine.llm.visual import Visual


def of_layer(state: Forward, index: int, seen: LayerState) -> Float[Tensor, "B K"] | None:
    """log(size) of every key of layer `index`, those of earlier calls first; None: 0 for all."""
    memory = state.memory
    held = None if memory is None else memory.bias(index, state.dense)
    merged = None if seen.visual is None or seen.visual.token_map.is_selection else seen.visual
    if not state.plan.size_bias or (held is None and merged is None):
        return None
    column = state.arange(state.length) if seen.column is None else seen.column
    if held is None:
        count = state.past if memory is None else memory.column(index, state.dense).shape[1]
        held = torch.zeros(state.batch, count, device=state.device)
    new = _of_columns(state, merged, column) if merged is not None else torch.zeros_like(column, dtype=held.dtype)
    return torch.cat([held, new], dim=1)


def added(mask: Tensor, bias: Float[Tensor, "B K"], dtype: torch.dtype) -> Float[Tensor, "B 1 Q K"]:
    """The mask `mask` [B, 1, Q, K], bool or additive, as an additive one of `dtype` with `bias` on every key."""
    if not mask.is_floating_point():
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return torch.where(readable(mask), mask + bias[:, None, None].to(mask), mask)


def in_products(
    queries: Float[Tensor, "B H Q d"], keys: Float[Tensor, "B G K d"], bias: Float[Tensor, "B K"] | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys of one more dimension, whose products times `scale` hold `bias`."""
    if bias is None:
        return queries, keys
    extra = (bias / scale)[:, None, :, None].expand(-1, keys.shape[1], -1, -1).to(keys)
    return torch.cat([queries, torch.ones_like(queries[..., :1])], dim=-1), torch.cat([keys, extra], dim=-1)


def _of_columns(state: Forward, visual: Visual, column: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """log(size) of the tokens at `column` of this call, of which `visual` is left; 0 for text and padding."""
    bias = torch.zeros(state.batch, state.length + 1, device=state.device)
    target = torch.where(visual.column < 0, state.length, visual.column)
    sizes = visual.sizes.clamp(min=1).masked_fill(visual.column < 0, 1)
    bias[visual.sample_index[:, None], target] = sizes.log()
    return bias.gather(1, torch.where(column < 0, state.length, column))


def readable(mask: Bool[Tensor, "..."] | Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Where a bool or additive mask lets a query look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
