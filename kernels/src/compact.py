"""Gather of everything that follows the tokens when a ragged set of them stays.

    out[b, j] = tensor[b, index[b, j]] for hidden states, cos, sin and mask rows, position_ids[..., b, index[b, j]]

Padding slots (index -1, or any index outside [0, N)) hold zeros, and False in a boolean mask. On the Triton path one
launch moves all tensors.
"""

from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl


class Compacted(NamedTuple):
    """What `compact` gathered; None where nothing was given."""

    hidden: Float[Tensor, "B K D"]
    cos: Float[Tensor, "B K d"] | None
    sin: Float[Tensor, "B K d"] | None
    position_ids: Int64[Tensor, "*A B K"] | None
    mask: Shaped[Tensor, "B *R K"] | None


def compact(
    index: Int64[Tensor, "B K"],
    hidden: Float[Tensor, "B N D"],
    *,
    cos: Float[Tensor, "#B N d"] | None = None,
    sin: Float[Tensor, "#B N d"] | None = None,
    position_ids: Int64[Tensor, "*A #B N"] | None = None,
    mask: Bool[Tensor, "B *R N"] | Float[Tensor, "B *R N"] | Int64[Tensor, "B *R N"] | None = None,
    impl: str | None = None,
) -> Compacted:
    """Keeps the tokens `index` of every sample, in the order given.

    `position_ids` may have leading axes ([3, B, N] for M-RoPE); `mask` may have axes between batch and tokens
    ([B, 1, Q, N]), its last one is gathered. A batch axis of 1 in `cos`, `sin` and `position_ids` is shared.

    >>> out = compact(torch.tensor([[2, 0, -1]]), torch.arange(3.0).view(1, 3, 1), position_ids=torch.arange(3)[None])
    >>> out.hidden[0, :, 0].tolist(), out.position_ids.tolist()
    ([2.0, 0.0, 0.0], [[2, 0, 0]])
    """
    if impl == "reference":
        return reference(index, hidden, cos, sin, position_ids, mask)
    batch, num_tokens = hidden.shape[:2]
    shared = [None if part is None else part.expand(batch, -1, -1) for part in (cos, sin)]
    ids = None if position_ids is None else position_ids.expand(*position_ids.shape[:-2], batch, num_tokens)
    flat_ids = None if ids is None else ids.reshape(-1, batch, num_tokens)
    rows = None if mask is None else mask.reshape(batch, -1, num_tokens)
    out = _operator(index, hidden, shared[0], shared[1], flat_ids, rows, impl)
    num_kept = index.shape[1]
    return Compacted(
        out[0],
        None if cos is None else out[1],
        None if sin is None else out[2],
        None if ids is None else out[3].view(*ids.shape[:-1], num_kept),
        None if mask is None else out[4].view(*mask.shape[:-1], num_kept),
    )


def cost(batch: int, num_kept: int, width: int, side_bytes: int = 0, itemsize: int = 4) -> Cost:
    """No arithmetic; bytes of reading and writing what stays (`side_bytes`: cos, sin, ids and mask of one token)."""
    return Cost(0, 2 * batch * num_kept * (width * itemsize + side_bytes))


def reference(
    index: Tensor,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
) -> Compacted:
    """The definition, one gather per tensor."""
    is_token = (index >= 0) & (index < hidden.shape[1])
    at = index.where(is_token, 0)

    def rows(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(index.shape[0], -1, -1)
        return torch.take_along_dim(tensor, at[..., None], dim=1).masked_fill(~is_token[..., None], 0)

    ids, kept_mask = position_ids, mask
    if ids is not None:
        lead = (1,) * (ids.dim() - 2)
        ids = ids.expand(*ids.shape[:-2], *hidden.shape[:2])
        ids = torch.take_along_dim(ids, at.view(*lead, *at.shape), dim=-1).masked_fill(~is_token, 0)
    if kept_mask is not None:
        shape = (at.shape[0], *(1,) * (kept_mask.dim() - 2), at.shape[1])
        kept_mask = torch.take_along_dim(kept_mask, at.view(shape), dim=-1).masked_fill(~is_token.view(shape), 0)
    return Compacted(
        rows(hidden), None if cos is None else rows(cos), None if sin is None else rows(sin), ids, kept_mask
    )


def _torch(
    index: Tensor,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    """Row indexing, which reads strided inputs in place and never materialises an expanded index."""
    is_token = (index >= 0) & (index < hidden.shape[1])
    at = index.where(is_token, 0)
    sample = torch.arange(index.shape[0], device=index.device)[:, None]
    absent = hidden.new_empty(0)

    def rows(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return absent.clone()
        return tensor[sample, at].masked_fill_(~is_token[..., None], 0)

    ids = absent.clone() if position_ids is None else position_ids[:, sample, at].masked_fill_(~is_token, 0)
    kept_mask = absent.clone()
    if mask is not None:
        shape = (mask.shape[0], mask.shape[1], at.shape[1])
        kept_mask = mask.gather(2, at[:, None].expand(shape)).masked_fill_(~is_token[:, None], 0)
    return [rows(hidden), rows(cos), rows(sin), ids, kept_mask]


def _outputs(index: Tensor, hidden: Tensor, cos: Any, sin: Any, position_ids: Any, mask: Any) -> list[Tensor]:
    batch, num_kept = index.shape

    def new(tensor: Tensor | None, *shape: int) -> Tensor:
        return hidden.new_empty(0) if tensor is None else tensor.new_empty(shape)

    return [
        new(hidden, batch, num_kept, hidden.shape[2]),
        new(cos, batch, num_kept, 0 if cos is None else cos.shape[2]),
        new(sin, batch, num_kept, 0 if sin is None else sin.shape[2]),
        new(position_ids, 0 if position_ids is None else position_ids.shape[0], batch, num_kept),
        new(mask, batch, 0 if mask is None else mask.shape[1], num_kept),
    ]


@lazy_jit
@no_type_check
def _gather_kernel(
    index,
    hidden,
    cos,
    sin,
    position_ids,
    mask,
    hidden_out,
    cos_out,
    sin_out,
    ids_out,
    mask_out,
    batch,
    num_tokens,
    num_kept,
    width,
    rope_width,
    num_axes,
    num_rows,
    index_batch,
    index_step,
    hidden_batch,
    hidden_row,
    hidden_step,
    cos_batch,
    cos_row,
    cos_step,
    sin_batch,
    sin_row,
    sin_step,
    ids_axis,
    ids_batch,
    ids_step,
    mask_batch,
    mask_row,
    mask_step,
    HAS_COS: tl.constexpr,
    HAS_SIN: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One kept slot: its hidden state, and in the first block of the width everything else."""
    slot = tl.program_id(0) % num_kept
    sample = (tl.program_id(0) // num_kept).to(tl.int64)
    out = tl.program_id(0).to(tl.int64)
    token = tl.load(index + sample * index_batch + slot * index_step)
    is_token = (token >= 0) & (token < num_tokens)
    safe = tl.where(is_token, token, 0)
    at = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    state = tl.load(hidden + sample * hidden_batch + safe * hidden_row + at * hidden_step, mask=at < width, other=0.0)
    tl.store(hidden_out + out * width + at, tl.where(is_token, state, 0.0), mask=at < width)
    if tl.program_id(1) == 0:
        rope = tl.arange(0, BLOCK_ROPE).to(tl.int64)
        rope_ok = rope < rope_width
        if HAS_COS:
            cos_at = cos + sample * cos_batch + safe * cos_row + rope * cos_step
            value = tl.where(is_token, tl.load(cos_at, mask=rope_ok, other=0.0), 0.0)
            tl.store(cos_out + out * rope_width + rope, value, mask=rope_ok)
        if HAS_SIN:
            sin_at = sin + sample * sin_batch + safe * sin_row + rope * sin_step
            value = tl.where(is_token, tl.load(sin_at, mask=rope_ok, other=0.0), 0.0)
            tl.store(sin_out + out * rope_width + rope, value, mask=rope_ok)
        if HAS_IDS:
            for axis in range(0, num_axes):
                axis_value = tl.load(position_ids + axis * ids_axis + sample * ids_batch + safe * ids_step)
                tl.store(ids_out + (axis * batch + sample) * num_kept + slot, tl.where(is_token, axis_value, 0))
        if HAS_MASK:
            for start in range(0, num_rows, BLOCK_ROWS):
                rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
                rows_ok = rows < num_rows
                row = tl.load(mask + sample * mask_batch + rows * mask_row + safe * mask_step, mask=rows_ok, other=0)
                row_at = mask_out + (sample * num_rows + rows) * num_kept + slot
                tl.store(row_at, tl.where(is_token, row, 0), mask=rows_ok)


def _triton(
    index: Tensor,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    outputs = _outputs(index, hidden, cos, sin, position_ids, mask)
    batch, num_kept = index.shape
    num_tokens, width = hidden.shape[1:]
    if num_kept == 0 or hidden.numel() == 0:
        return _torch(index, hidden, cos, sin, position_ids, mask) if num_tokens else [o.zero_() for o in outputs]
    rope_width = next((part.shape[2] for part in (cos, sin) if part is not None), 1)
    given = [hidden if part is None else _as_bytes(part) for part in (cos, sin, position_ids, mask)]
    block = min(2048, max(16, next_power_of_two(width)))
    _gather_kernel[(batch * num_kept, cdiv(width, block))](
        index,
        hidden,
        *given,
        *[_as_bytes(part) for part in outputs],
        batch,
        num_tokens,
        num_kept,
        width,
        rope_width,
        1 if position_ids is None else position_ids.shape[0],
        1 if mask is None else mask.shape[1],
        *index.stride(),
        *hidden.stride(),
        *given[0].stride(),
        *given[1].stride(),
        *given[2].stride(),
        *given[3].stride(),
        HAS_COS=cos is not None,
        HAS_SIN=sin is not None,
        HAS_IDS=position_ids is not None,
        HAS_MASK=mask is not None,
        BLOCK_D=block,
        BLOCK_ROPE=max(16, next_power_of_two(rope_width)),
        BLOCK_ROWS=64,
    )
    return outputs


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _fake(
    index: Tensor, hidden: Tensor, cos: Any, sin: Any, position_ids: Any, mask: Any, impl: str | None
) -> list[Tensor]:
    return _outputs(index, hidden, cos, sin, position_ids, mask)


def _flops(*arguments: Any) -> int:
    return 0


@register("compact", fake=_fake, flops=_flops)
def _operator(
    index: Tensor,
    hidden: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
    impl: str | None,
) -> list[Tensor]:
    run = _triton if choose_path(hidden, impl).name == "triton" else _torch
    return run(index, hidden, cos, sin, position_ids, mask)
