"""Attention of a few query rows over all keys: softmax or raw logits, reduced over heads.

    out[b, r, n] = mean over heads of softmax over valid n of scale q_rows[b, h, r] . k[b, g(h), n]

Masked keys get probability 0; a row without a valid key is all 0. With `softmax=False` the scaled logits come out, and
masked keys hold -inf. Causality is a mask: `mask[b, r, n] = n <= position of row r`. Memory: O(H R N), R rows at most
`ROW_GROUP` at a time.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vtc.kernels._cosine import accumulator, chunks
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._tiles import dot_arithmetic

ROW_GROUP = 16
ROW_BYTES = 512 << 10
WIDEST_HEAD = 256


def attention_rows(
    q_rows: Float[Tensor, "B H R d"],
    k: Float[Tensor, "B G N d"],
    *,
    mask: Bool[Tensor, "B R N"] | Bool[Tensor, "B N"] | None = None,
    scale: float | None = None,
    softmax: bool = True,
    reduce_heads: bool = True,
    impl: str | None = None,
) -> Float[Tensor, "B R N"] | Float[Tensor, "B H R N"]:
    """Attention probabilities (or logits) of the given query rows, float32.

    `k` may have fewer heads (grouped queries): head h reads key head h // (H / G). `scale` defaults to d ** -0.5.
    `mask` is True where a key may be seen.

    >>> keys, mask = torch.zeros(1, 1, 4, 8), torch.tensor([[True, True, False, False]])
    >>> attention_rows(torch.zeros(1, 2, 1, 8), keys, mask=mask)
    tensor([[[0.5000, 0.5000, 0.0000, 0.0000]]])
    """
    if q_rows.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q_rows.shape[1]} query heads and {k.shape[1]} key heads: the first must be a multiple of the second."
        )
    scale = q_rows.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None].expand(-1, q_rows.shape[2], -1)
    if impl == "reference":
        return reference(q_rows, k, mask, scale, softmax, reduce_heads)
    rows: Tensor = _operator(q_rows, k, mask, scale, softmax, reduce_heads, impl)
    return rows


def cost(
    batch: int, heads: int, key_heads: int, num_rows: int, num_tokens: int, width: int, *, itemsize: int = 4
) -> Cost:
    """FLOPs of q k^T; bytes of reading the keys once and writing one row per query row."""
    flops = 2 * batch * heads * num_rows * num_tokens * width
    return Cost(flops, batch * num_tokens * (key_heads * width * itemsize + 4 * num_rows))


def reference(
    q_rows: Tensor, k: Tensor, mask: Tensor | None, scale: float, softmax: bool, reduce_heads: bool
) -> Tensor:
    """The definition."""
    dtype = accumulator(q_rows)
    keys = k.to(dtype).repeat_interleave(q_rows.shape[1] // k.shape[1], dim=1)
    rows = q_rows.to(dtype) @ keys.transpose(-1, -2) * scale  # [B, H, R, N]
    if mask is not None:
        rows = rows.masked_fill(~mask[:, None], float("-inf"))
    if softmax:
        rows = torch.softmax(rows, dim=-1)
        if mask is not None:
            rows = rows.masked_fill(~mask[:, None], 0.0)
    return rows.mean(dim=1) if reduce_heads else rows


def _torch(q_rows: Tensor, k: Tensor, mask: Tensor | None, scale: float, softmax: bool, reduce_heads: bool) -> Tensor:
    """A few key heads at a time, so that grouped keys are not repeated and logits stay within `ROW_BYTES`."""
    dtype = accumulator(q_rows)
    batch, heads, num_rows, width = q_rows.shape
    groups, num_tokens = k.shape[1], k.shape[2]
    repeat = heads // groups
    shape = (batch, num_rows, num_tokens) if reduce_heads else (batch, heads, num_rows, num_tokens)
    result = q_rows.new_zeros(shape, dtype=dtype)
    row_bytes = 4 * num_tokens * repeat * min(num_rows, ROW_GROUP)
    key_bytes = 0 if k.dtype == dtype else 4 * num_tokens * width
    step = max(1, ROW_BYTES // max(1, row_bytes + key_bytes))
    for b in range(batch):
        for own in chunks(groups, step):
            keys = k[b, own].to(dtype).transpose(1, 2)
            queries = q_rows[b, own.start * repeat : own.stop * repeat].view(-1, repeat, num_rows, width)
            for part in chunks(num_rows, ROW_GROUP):
                lines = queries[:, :, part].to(dtype).mul(scale)
                rows = torch.bmm(lines.flatten(1, 2), keys).view(-1, lines.shape[2], num_tokens)  # [heads, R, N]
                seen = None if mask is None else mask[b, part]
                if seen is not None:
                    rows.masked_fill_(~seen, float("-inf"))
                if softmax:
                    rows = torch.softmax(rows, dim=-1)
                    if seen is not None:
                        rows.masked_fill_(~seen, 0.0)
                if reduce_heads:
                    result[b, part] += rows.sum(dim=0)
                else:
                    result[b, own.start * repeat : own.stop * repeat, part] = rows
    return result.div_(heads) if reduce_heads else result


@lazy_jit
@no_type_check
def _logit_kernel(
    q_rows,
    k,
    mask,
    logits,
    top,
    total,
    groups,
    repeat,
    num_rows,
    num_tokens,
    width,
    scale,
    q_batch,
    q_head,
    q_row,
    q_step,
    k_batch,
    k_head,
    k_row,
    k_step,
    mask_batch,
    mask_row,
    mask_step,
    HAS_MASK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of all query rows of one key head for a block of keys, and the block's part of the softmax sum."""
    sample = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    line = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    line_ok = line < repeat * num_rows
    head = group * repeat + line // num_rows
    row = line % num_rows
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = columns < num_tokens
    at = tl.arange(0, WIDTH).to(tl.int64)
    inside = at < width
    q_at = q_rows + sample * q_batch + (head * q_head + row * q_row)[:, None] + at[None, :] * q_step
    queries = tl.load(q_at, mask=line_ok[:, None] & inside[None, :], other=0.0)
    k_at = k + sample * k_batch + group * k_head + columns[None, :] * k_row + at[:, None] * k_step
    keys = tl.load(k_at, mask=ok[None, :] & inside[:, None], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
        keys = keys.to(tl.float32)
    tile = tl.dot(queries, keys, input_precision=PRECISION) * scale
    seen = line_ok[:, None] & ok[None, :]
    if HAS_MASK:
        mask_at = mask + sample * mask_batch + row[:, None] * mask_row + columns[None, :] * mask_step
        seen = seen & tl.load(mask_at, mask=seen, other=0).to(tl.int1)
    tile = tl.where(seen, tile, float("-inf"))
    out = (sample * groups * repeat + head) * num_rows + row
    tl.store(logits + out[:, None] * num_tokens + columns[None, :], tile, mask=line_ok[:, None] & ok[None, :])
    highest = tl.max(tile, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    part = tl.sum(tl.exp(tile - shift[:, None]), axis=1)
    tl.store(top + out * tl.num_programs(0) + tl.program_id(0), highest, mask=line_ok)
    tl.store(total + out * tl.num_programs(0) + tl.program_id(0), part, mask=line_ok)


@lazy_jit
@no_type_check
def _finish_kernel(
    logits,
    log_sum,
    result,
    heads,
    num_rows,
    num_tokens,
    SOFTMAX: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Probabilities from logits, summed over heads in ascending order when REDUCE."""
    sample = (tl.program_id(1) // num_rows).to(tl.int64)
    row = tl.program_id(1) % num_rows
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = columns < num_tokens
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for head in range(0, heads):
        line = (sample * heads + head) * num_rows + row
        value = tl.load(logits + line * num_tokens + columns, mask=ok, other=0.0)
        if SOFTMAX:
            value = tl.exp(value - tl.load(log_sum + line))
        if REDUCE:
            total += value
        else:
            tl.store(result + line * num_tokens + columns, value, mask=ok)
    if REDUCE:
        tl.store(result + (sample * num_rows + row) * num_tokens + columns, total / heads, mask=ok)


def _triton(q_rows: Tensor, k: Tensor, mask: Tensor | None, scale: float, softmax: bool, reduce_heads: bool) -> Tensor:
    batch, heads, num_rows, width = q_rows.shape
    groups, num_tokens = k.shape[1], k.shape[2]
    if q_rows.numel() == 0 or k.numel() == 0:
        return _torch(q_rows, k, mask, scale, softmax, reduce_heads)
    if num_rows > ROW_GROUP:
        parts = [
            _triton(q_rows[:, :, part], k, None if mask is None else mask[:, part], scale, softmax, reduce_heads)
            for part in chunks(num_rows, ROW_GROUP)
        ]
        return torch.cat(parts, dim=-2)
    block, repeat = 128, heads // groups
    blocks = cdiv(num_tokens, block)
    logits = torch.empty((batch, heads, num_rows, num_tokens), dtype=torch.float32, device=k.device)
    top = torch.empty((batch, heads, num_rows, blocks), dtype=torch.float32, device=k.device)
    total = torch.empty_like(top)
    bits = None if mask is None else mask.view(torch.uint8)
    block_rows = min(64, max(16, next_power_of_two(repeat * num_rows)))
    _logit_kernel[(blocks, batch * groups, cdiv(repeat * num_rows, block_rows))](
        q_rows,
        k,
        logits if bits is None else bits,
        logits,
        top,
        total,
        groups,
        repeat,
        num_rows,
        num_tokens,
        width,
        scale,
        *q_rows.stride(),
        *k.stride(),
        *((0, 0, 0) if bits is None else bits.stride()),
        HAS_MASK=bits is not None,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        WIDTH=max(16, next_power_of_two(width)),
        **dot_arithmetic(k),
    )
    if not softmax and not reduce_heads:
        return logits
    log_sum = torch.logsumexp(top + total.log(), dim=-1).nan_to_num_(nan=float("inf"), neginf=float("inf"))
    shape = (batch, num_rows, num_tokens) if reduce_heads else logits.shape
    result = torch.empty(shape, dtype=torch.float32, device=k.device)
    _finish_kernel[(cdiv(num_tokens, 1024), batch * num_rows)](
        logits,
        log_sum,
        result,
        heads,
        num_rows,
        num_tokens,
        SOFTMAX=softmax,
        REDUCE=reduce_heads,
        BLOCK=1024,
    )
    return result


def _fake(
    q_rows: Tensor, k: Tensor, mask: Any, scale: float, softmax: bool, reduce_heads: bool, impl: str | None
) -> Tensor:
    batch, heads, num_rows, _ = q_rows.shape
    shape = (batch, num_rows, k.shape[2]) if reduce_heads else (batch, heads, num_rows, k.shape[2])
    return q_rows.new_empty(shape, dtype=accumulator(q_rows))


def _flops(q_rows: Any, k: Any, mask: Any, scale: float, softmax: bool, reduce_heads: bool, impl: str | None) -> int:
    return cost(q_rows[0], q_rows[1], k[1], q_rows[2], k[2], k[3]).flops


@register("attention_rows", fake=_fake, flops=_flops)
def _operator(
    q_rows: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    softmax: bool,
    reduce_heads: bool,
    impl: str | None,
) -> Tensor:
    is_triton = choose_path(q_rows, impl).name == "triton" and q_rows.shape[-1] <= WIDEST_HEAD
    run = _triton if is_triton else _torch
    return run(q_rows, k, mask, scale, softmax, reduce_heads)
