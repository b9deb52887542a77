"""`size_bias`: log(size) of merged tokens on the attention logits of their keys, layer by layer.

A merged token stands for several, and log(size) lets it weigh as much as they did. Sizes are those at the layer: what
the tower, the door and the stages up to this layer merged. Layers before a merge keep their own, in the caches too.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vtc.engine.llm.rows import Rows
from vtc.engine.plan import Plan


def of_layer(plan: Plan, index: int, seen: Rows) -> Float[Tensor, "B K"] | None:
    """log(size) of every key of layer `index`, those of earlier calls first; None: 0 for all."""
    prompt = seen.prompt
    before = prompt.before(index)
    held = None if before is None else before.biases
    merges = seen.visual is not None and not seen.visual.token_map.is_selection
    if not plan.size_bias or (held is None and not merges):
        return None
    if held is None:
        held = torch.zeros(prompt.batch, prompt.entries(index), device=prompt.device)
    new = _of_rows(seen) if merges else torch.zeros_like(seen.columns, dtype=held.dtype)
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


def _of_rows(rows: Rows) -> Float[Tensor, "B R"]:
    """log(size) of the token of each row; 0 for text and padding."""
    prompt, visual = rows.prompt, rows.visual
    assert visual is not None
    bias = torch.zeros(prompt.batch, prompt.length + 1, device=prompt.device)
    target = torch.where(visual.column < 0, prompt.length, visual.column)
    sizes = visual.sizes.clamp(min=1).masked_fill(visual.column < 0, 1)
    bias[visual.sample_index[:, None], target] = sizes.log()
    return bias.gather(1, torch.where(rows.columns < 0, prompt.length, rows.columns))


def readable(mask: Bool[Tensor, "..."] | Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Where a bool or additive mask lets a query look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
