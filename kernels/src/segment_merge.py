"""Weighted mean or sum of tokens by assignment, with the same result in every run.

    out[b, s] = sum over tokens n with assignment[b, n] = s of w_n x_n,   divided by the sum of those w_n for `mean`

Assignment -1 (or any value outside [0, num_slots)) drops the token. A slot without a token, or whose weights sum to 0,
holds zeros. Sums run in float32 in the order of the tokens; no atomic addition is used. The result has x's dtype.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vtc.kernels._cosine import accumulator, chunks
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl

REDUCTIONS = ("mean", "sum")
BLOCK_BYTES = 512 << 10


def segment_merge(
    x: Float[Tensor, "B N D"],
    assignment: Int64[Tensor, "B N"],
    num_slots: int,
    *,
    weights: Float[Tensor, "B N"] | None = None,
    reduce: str = "mean",
    impl: str | None = None,
) -> Float[Tensor, "B K D"]:
    """One token per slot: the mean (or sum) of the tokens assigned to it.

    >>> segment_merge(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[1, 1, -1]]), 2)[0, :, 0].tolist()
    [0.0, 2.0]
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} for segment_merge: choose one of {', '.join(REDUCTIONS)}.")
    if num_slots < 0:
        raise ValueError(f"num_slots={num_slots} for segment_merge: it must be 0 or more.")
    if impl == "reference":
        return reference(x, assignment, num_slots, weights, reduce)
    merged: Tensor = _operator(x, assignment, num_slots, weights, reduce, impl)
    return merged


def cost(batch: int, num_tokens: int, width: int, num_slots: int, itemsize: int = 4) -> Cost:
    """One multiply-add per element; bytes of reading every token and writing every slot once."""
    flops = 2 * batch * num_tokens * width
    return Cost(flops, batch * ((num_tokens + num_slots) * width * itemsize + 8 * num_tokens))


def reference(x: Tensor, assignment: Tensor, num_slots: int, weights: Tensor | None, reduce: str) -> Tensor:
    """The definition, as a product with the K x N matrix of weights."""
    slots = torch.arange(num_slots, device=x.device)[:, None]
    matrix = (assignment[:, None] == slots).to(accumulator(x))  # [B, K, N]
    if weights is not None:
        matrix = matrix * weights[:, None]
    merged = matrix @ x.to(matrix.dtype)
    if reduce == "mean":
        total = matrix.sum(dim=-1, keepdim=True)
        merged = torch.where(total != 0, merged / total, 0.0)
    return merged.to(x.dtype)


def _torch(x: Tensor, assignment: Tensor, num_slots: int, weights: Tensor | None, reduce: str) -> Tensor:
    """On the CPU an ordered scatter; elsewhere a product with the one-hot matrix of a block of tokens."""
    batch, num_tokens, width = x.shape
    dtype = accumulator(x)
    weight = torch.ones((batch, num_tokens), dtype=dtype, device=x.device) if weights is None else weights.to(dtype)
    is_dropped = (assignment < 0) | (assignment >= num_slots)
    slot, weight = assignment.masked_fill(is_dropped, 0), weight.masked_fill(is_dropped, 0.0)
    merged = x.new_zeros((batch, num_slots, width), dtype=dtype)
    if num_slots == 0:
        return merged.to(x.dtype)
    total = x.new_zeros((batch, num_slots), dtype=dtype)
    step = max(1, BLOCK_BYTES // (4 * max(1, batch * max(width, num_slots))))
    slots = None if x.device.type == "cpu" else torch.arange(num_slots, device=x.device)[:, None]
    for rows in chunks(num_tokens, step):
        block = (x[:, rows].to(dtype) * weight[:, rows, None]).masked_fill_(is_dropped[:, rows, None], 0.0)
        if slots is None:
            merged.scatter_add_(1, slot[:, rows, None].expand(-1, -1, width), block)
            total.scatter_add_(1, slot[:, rows], weight[:, rows])
        else:
            matrix = (slot[:, None, rows] == slots).to(dtype)
            merged += matrix @ block
            total += (matrix @ weight[:, rows, None])[..., 0]
    if reduce == "mean":
        merged.mul_(torch.where(total != 0, total.reciprocal(), 0.0)[..., None])
    return merged.to(x.dtype)


@lazy_jit
@no_type_check
def _merge_kernel(
    x,
    order,
    bounds,
    weights,
    merged,
    num_tokens,
    num_slots,
    width,
    x_batch,
    x_row,
    x_step,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One slot and one block of the width: its tokens one after the other, in ascending order."""
    sample = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0)
    at = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = at < width
    bound = bounds + sample * (num_slots + 1) + slot
    member = tl.load(bound)
    stop = tl.load(bound + 1)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    weight_total = 0.0
    while member < stop:
        token = tl.load(order + sample * num_tokens + member)
        part = tl.load(x + sample * x_batch + token * x_row + at * x_step, mask=inside, other=0.0).to(tl.float32)
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights + sample * num_tokens + token)
        total += part * weight
        weight_total += weight
        member += 1
    if IS_MEAN:
        total = tl.where(weight_total != 0, total / tl.where(weight_total != 0, weight_total, 1.0), 0.0)
    out = merged + (sample * num_slots + slot) * width + at
    tl.store(out, total.to(merged.dtype.element_ty), mask=inside)


def _triton(x: Tensor, assignment: Tensor, num_slots: int, weights: Tensor | None, reduce: str) -> Tensor:
    """A stable sort brings the tokens of a slot together in ascending order; each slot then reads its own run."""
    batch, num_tokens, width = x.shape
    merged = torch.empty((batch, num_slots, width), dtype=x.dtype, device=x.device)
    if merged.numel() == 0:
        return merged
    slot = torch.where(assignment < 0, num_slots, assignment)
    ordered, order = torch.sort(slot, dim=-1, stable=True)
    slots = torch.arange(num_slots + 1, device=x.device).expand(batch, -1).contiguous()
    bounds = torch.searchsorted(ordered, slots)
    block = min(1024, max(16, next_power_of_two(width)))
    _merge_kernel[(num_slots, cdiv(width, block), batch)](
        x,
        order,
        bounds,
        order if weights is None else weights.to(torch.float32).contiguous(),
        merged,
        num_tokens,
        num_slots,
        width,
        *x.stride(),
        HAS_WEIGHTS=weights is not None,
        IS_MEAN=reduce == "mean",
        BLOCK_D=block,
    )
    return merged


def _fake(x: Tensor, assignment: Any, num_slots: int, weights: Any, reduce: str, impl: str | None) -> Tensor:
    return x.new_empty((x.shape[0], num_slots, x.shape[2]))


def _flops(x: Any, assignment: Any, num_slots: int, weights: Any, reduce: str, impl: str | None) -> int:
    return cost(x[0], x[1], x[2], num_slots).flops


@register("segment_merge", fake=_fake, flops=_flops)
def _operator(
    x: Tensor, assignment: Tensor, num_slots: int, weights: Tensor | None, reduce: str, impl: str | None
) -> Tensor:
    run = _triton if choose_path(x, impl).name == "triton" else _torch
    return run(x, assignment, num_slots, weights, reduce)
