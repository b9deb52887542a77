"""Attention each token receives, without the N x N matrix of probabilities.

    received[b, j] = 1 / n(j) * sum over valid queries i of P[b, i, j],   P = softmax over keys of scale q_i . k_j

Query i sees key j when both carry the same segment id (and, if causal, j <= i). n(j) is the number of tokens with j's
segment id; without segments it is N, so the values of a sample sum to 1 (with S segments, the sum over each segment is
1). Segment id -1 is padding: it neither sees nor is seen, and receives 0. `reduce_heads` takes the mean over heads.
Two passes over the keys (row sums, then column sums); memory beside the result: O(H N).
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vtc.kernels._cosine import accumulator, chunks
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._tiles import dot_arithmetic

ROW_BYTES = 2 << 20
DEVICE_ROW_BYTES = 8 << 20  # fewer launches
LEAST_ROWS = 32
WIDEST_HEAD = 256
LOG2_E = 1.4426950408889634


def received_attention(
    q: Float[Tensor, "B H N d"],
    k: Float[Tensor, "B G N d"],
    *,
    segments: Int64[Tensor, "B N"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    reduce_heads: bool = True,
    impl: str | None = None,
) -> Float[Tensor, "B N"] | Float[Tensor, "B H N"]:
    """Mean attention probability that each token receives from the queries of its segment (float32).

    `k` may have fewer heads (grouped queries): head h reads key head h // (H / G). `scale` defaults to d ** -0.5.

    >>> received_attention(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads and {k.shape[1]} key heads: the first must be a multiple of the second."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        return reference(q, k, segments, causal, scale, reduce_heads)
    received: Tensor = _operator(q, k, segments, causal, scale, reduce_heads, impl)
    return received


def cost(batch: int, heads: int, key_heads: int, num_tokens: int, width: int, *, itemsize: int = 4) -> Cost:
    """FLOPs of the two passes of q k^T (the second recomputes the first); bytes of one reading of q and k."""
    flops = 4 * batch * heads * num_tokens * num_tokens * width
    return Cost(flops, batch * num_tokens * ((heads + key_heads) * width * itemsize + 4))


def reference(q: Tensor, k: Tensor, segments: Tensor | None, causal: bool, scale: float, reduce_heads: bool) -> Tensor:
    """The definition, with all probabilities."""
    dtype, num_tokens = accumulator(q), q.shape[2]
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.to(dtype) @ keys.transpose(-1, -2) * scale  # [B, H, N, N]
    if segments is None:
        segments = torch.zeros(q.shape[0], num_tokens, dtype=torch.int64, device=q.device)
    sees = (segments[:, :, None] == segments[:, None]) & (segments >= 0)[:, None]
    count = sees.sum(dim=-1).clamp(min=1)
    if causal:
        sees = sees & torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).tril()
    logits = logits.masked_fill(~sees[:, None], float("-inf"))
    probabilities = torch.softmax(logits, dim=-1).masked_fill(~sees[:, None], 0.0)
    received = probabilities.sum(dim=-2) / count[:, None]
    return received.mean(dim=1) if reduce_heads else received


def _segment_sizes(segments: Tensor | None, like: Tensor) -> Tensor:
    """n(j) [B, N] without counting on the host: the run length of each id in the sorted ids."""
    if segments is None:
        return torch.full((like.shape[0], like.shape[2]), like.shape[2], dtype=torch.int64, device=like.device)
    segments = segments.contiguous()
    ordered = segments.sort(dim=-1).values
    return torch.searchsorted(ordered, segments, right=True) - torch.searchsorted(ordered, segments)


def _torch(q: Tensor, k: Tensor, segments: Tensor | None, causal: bool, scale: float, reduce_heads: bool) -> Tensor:
    """Blocks of query rows: every block has its complete softmax, and adds its column sums."""
    dtype = accumulator(q)
    batch, heads, num_tokens, width = q.shape
    groups = k.shape[1]
    repeat = heads // groups
    received = q.new_zeros((batch, heads, num_tokens), dtype=dtype)
    row_bytes = ROW_BYTES if q.device.type == "cpu" else DEVICE_ROW_BYTES
    step = max(LEAST_ROWS, row_bytes // (4 * max(1, repeat * num_tokens)))
    position = torch.arange(num_tokens, device=q.device)
    for b in range(batch):
        for g in range(groups):
            keys = k[b, g].to(dtype).transpose(0, 1)
            own = slice(g * repeat, (g + 1) * repeat)
            for rows in chunks(num_tokens, step):
                queries = q[b, own, rows].to(dtype).reshape(-1, width) * scale
                logits = torch.mm(queries, keys).view(repeat, -1, num_tokens)
                if segments is not None:
                    apart = (segments[b, rows, None] != segments[b]) | (segments[b] < 0)
                    logits.masked_fill_(apart, float("-inf"))
                if causal:
                    logits.masked_fill_(position > position[rows, None], float("-inf"))
                top = logits.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
                logits.sub_(top).exp_()
                total = logits.sum(dim=-1)
                share = torch.where(total > 0, total.reciprocal(), 0.0)
                received[b, own] += torch.bmm(share[:, None], logits)[:, 0]
    received /= _segment_sizes(segments, q)[:, None]
    return received.mean(dim=1) if reduce_heads else received


@lazy_jit
@no_type_check
def _row_kernel(
    q,
    k,
    segments,
    row_log_sum,
    heads,
    repeat,
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
    HAS_SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2 of each query's softmax denominator, `scale` including log2(e); +inf for a query that sees nothing."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    rows_ok = rows < num_tokens
    at = tl.arange(0, WIDTH).to(tl.int64)
    inside = at < width
    q_at = q + sample * q_batch + head * q_head + rows[:, None] * q_row + at[None, :] * q_step
    queries = tl.load(q_at, mask=rows_ok[:, None] & inside[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    k_sample = k + sample * k_batch + (head // repeat) * k_head
    if HAS_SEGMENTS:
        row_segment = tl.load(segments + sample * num_tokens + rows, mask=rows_ok, other=-1)
        most = tl.max(row_segment, axis=0)
        least = tl.min(tl.where(row_segment < 0, most, row_segment), axis=0)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    stop = num_tokens
    if CAUSAL:
        stop = tl.minimum(num_tokens, (tl.program_id(0) + 1) * BLOCK)
    for start in range(0, stop, BLOCK):
        columns = (start + tl.arange(0, BLOCK)).to(tl.int64)
        ok = columns < num_tokens
        sees = rows_ok[:, None] & ok[None, :]
        is_near = True
        if HAS_SEGMENTS:
            segment = tl.load(segments + sample * num_tokens + columns, mask=ok, other=-1)
            sees = sees & (row_segment[:, None] == segment[None, :]) & (segment >= 0)[None, :]
            lowest = tl.min(tl.where(segment < 0, most + 1, segment), axis=0)
            is_near = (tl.max(segment, axis=0) >= least) & (lowest <= most) & (most >= 0)
        if CAUSAL:
            sees = sees & (columns[None, :] <= rows[:, None])
        if is_near:
            k_at = k_sample + columns[None, :] * k_row + at[:, None] * k_step
            keys = tl.load(k_at, mask=ok[None, :] & inside[:, None], other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
            logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
            logits = tl.where(sees, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
            top = new_top
    result = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(row_log_sum + tl.program_id(1).to(tl.int64) * num_tokens + rows, result, mask=rows_ok)


@lazy_jit
@no_type_check
def _column_kernel(
    q,
    k,
    segments,
    row_log_sum,
    received,
    heads,
    repeat,
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
    HAS_SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Column sums of the probabilities of one head, rows visited in ascending order."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns_ok = columns < num_tokens
    at = tl.arange(0, WIDTH).to(tl.int64)
    inside = at < width
    k_at = k + sample * k_batch + (head // repeat) * k_head + columns[None, :] * k_row + at[:, None] * k_step
    keys = tl.load(k_at, mask=columns_ok[None, :] & inside[:, None], other=0.0)
    if UPCAST:
        keys = keys.to(tl.float32)
    q_sample = q + sample * q_batch + head * q_head
    out = tl.program_id(1).to(tl.int64) * num_tokens
    if HAS_SEGMENTS:
        segment = tl.load(segments + sample * num_tokens + columns, mask=columns_ok, other=-1)
        most = tl.max(segment, axis=0)
        least = tl.min(tl.where(segment < 0, most, segment), axis=0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * BLOCK
    for start in range(begin, num_tokens, BLOCK):
        rows = (start + tl.arange(0, BLOCK)).to(tl.int64)
        ok = rows < num_tokens
        sees = ok[:, None] & columns_ok[None, :]
        is_near = True
        if HAS_SEGMENTS:
            row_segment = tl.load(segments + sample * num_tokens + rows, mask=ok, other=-1)
            sees = sees & (row_segment[:, None] == segment[None, :]) & (segment >= 0)[None, :]
            lowest = tl.min(tl.where(row_segment < 0, most + 1, row_segment), axis=0)
            is_near = (tl.max(row_segment, axis=0) >= least) & (lowest <= most) & (most >= 0)
        if CAUSAL:
            sees = sees & (columns[None, :] <= rows[:, None])
        if is_near:
            q_at = q_sample + rows[:, None] * q_row + at[None, :] * q_step
            queries = tl.load(q_at, mask=ok[:, None] & inside[None, :], other=0.0)
            if UPCAST:
                queries = queries.to(tl.float32)
            logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
            denominator = tl.load(row_log_sum + out + rows, mask=ok, other=float("inf"))
            shifted = tl.where(sees, logits - denominator[:, None], float("-inf"))
            total += tl.sum(tl.exp2(shifted), axis=0)
    tl.store(received + out + columns, total, mask=columns_ok)


def _triton(q: Tensor, k: Tensor, segments: Tensor | None, causal: bool, scale: float, reduce_heads: bool) -> Tensor:
    batch, heads, num_tokens, width = q.shape
    received = torch.empty((batch, heads, num_tokens), dtype=torch.float32, device=q.device)
    if received.numel() == 0 or width == 0:
        return _torch(q, k, segments, causal, scale, reduce_heads)
    row_log_sum = torch.empty_like(received)
    block = 64 if width <= 128 and q.dtype != torch.float32 else 32
    grid = (cdiv(num_tokens, block), batch * heads)
    ids = None if segments is None else segments.contiguous()
    sizes = (heads, heads // k.shape[1], num_tokens, width, scale * LOG2_E, *q.stride(), *k.stride())
    options = {
        "HAS_SEGMENTS": ids is not None,
        "CAUSAL": causal,
        "BLOCK": block,
        "WIDTH": max(16, next_power_of_two(width)),
        **dot_arithmetic(q),
    }
    segment_pointer = row_log_sum if ids is None else ids
    _row_kernel[grid](q, k, segment_pointer, row_log_sum, *sizes, **options)
    _column_kernel[grid](q, k, segment_pointer, row_log_sum, received, *sizes, **options)
    received /= _segment_sizes(segments, q)[:, None]
    return received.mean(dim=1) if reduce_heads else received


def _fake(q: Tensor, k: Any, segments: Any, causal: bool, scale: float, reduce_heads: bool, impl: str | None) -> Tensor:
    shape = (q.shape[0], q.shape[2]) if reduce_heads else (q.shape[0], q.shape[1], q.shape[2])
    return q.new_empty(shape, dtype=accumulator(q))


def _flops(q: Any, k: Any, segments: Any, causal: bool, scale: float, reduce_heads: bool, impl: str | None) -> int:
    return cost(q[0], q[1], k[1], q[2], q[3]).flops


@register("received_attention", fake=_fake, flops=_flops)
def _operator(
    q: Tensor,
    k: Tensor,
    segments: Tensor | None,
    causal: bool,
    scale: float,
    reduce_heads: bool,
    impl: str | None,
) -> Tensor:
    is_triton = choose_path(q, impl).name == "triton" and q.shape[-1] <= WIDEST_HEAD
    run = _triton if is_triton else _torch
    return run(q, k, segments, causal, scale, reduce_heads)
