"""Attention masks of every form that transformers hands to decoder layers, cut to the rows and columns that are left.

Forms: None (sdpa and flash: plain causal, nothing padded), [B, kv] (flash), [B, 1, q, kv] bool (sdpa) or additive
float (eager). Index -1 marks padding: nobody may look there.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vtc.errors import StateError, UnsupportedFeatureError
from vtc.indices import take

#: attention implementations that take an additive mask
ADDITIVE = ("eager", "sdpa")


def cut(mask: Tensor, rows: Int[Tensor, "B Q"] | None, columns: Int[Tensor, "B K"]) -> Tensor:
    """`mask` at `rows` (None: all) and `columns`; columns -1 are masked.

    Raises:
        UnsupportedFeatureError: a mask that is no plain tensor (flex attention).
    """
    if not isinstance(mask, Tensor):
        raise UnsupportedFeatureError(
            f"attention mask of type {type(mask).__name__}: vtc cuts dense masks. "
            "Load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    columns = columns.to(mask.device)
    if mask.dim() == 2:
        return take(mask, columns).masked_fill(columns < 0, 0)
    if rows is not None:
        mask = take(mask, rows, 2)
    return take(mask, columns, 3).masked_fill((columns < 0)[:, None, None, :], _nothing(mask))


def check_width(mask: Tensor | None, width: int, queries: int | None = None) -> None:
    """Refuse a mask of the host that covers other keys or queries than vtc knows of; 2-D masks have no queries.

    Raises:
        StateError: nothing can be cut out of it rightly.
    """
    if not isinstance(mask, Tensor):
        return
    fits = mask.shape[-1] == width and (queries is None or mask.dim() < 3 or mask.shape[-2] in (1, queries))
    if not fits:
        raise StateError(
            f"the attention mask has the shape {tuple(mask.shape)}, and there are {width} keys"
            f"{'' if queries is None else f' and {queries} queries'}. The KV cache holds something else than the model "
            "thinks; prefill again, with the attention_mask of the whole conversation."
        )


def causal(valid: Bool[Tensor, "B K"], queries: int, dtype: torch.dtype, implementation: str | None) -> Tensor:
    """The causal mask of the last `queries` rows over the keys `valid`, in the form that `implementation` reads."""
    if implementation is not None and implementation.startswith("flash"):
        return valid
    keys = valid.shape[1]
    order = torch.arange(keys, device=valid.device)
    mask = (order <= order[keys - queries :, None]) & valid[:, None, None, :]
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def _nothing(mask: Tensor) -> bool | float:
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else False
