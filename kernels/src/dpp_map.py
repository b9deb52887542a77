"""Greedy MAP of a determinantal point process: the subset whose kernel has (greedily) the largest determinant.

    next = argmax of d2;   e = (K_j - sum over earlier t of c_t[j] c_t) / sqrt(d2_j);   d2 -= e^2;   c_step = e

d2 starts as the diagonal of K. CDPruner's kernel is K_ij = quality_i s_ij quality_j, s = cosine: `dpp_map_features`
computes its rows from the features, so that no N x N matrix is stored (memory: K N for the c_t). Ties go to the lowest
index, no token is picked twice, slots beyond the number of valid tokens hold -1. Once a token's conditional variance
d2_j is below 1e-6 of K_jj it is a combination of earlier picks; picking it changes nothing (e = 0) instead of dividing
by zero.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vtc.kernels._cosine import accumulator, cosine_to, inverse_norm, normalise
from vtc.kernels._dispatch import Cost, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._greedy import (
    LARGEST_IN_REGISTERS,
    STEP_BLOCK,
    best_of_blocks,
    cosines_with,
    first_blocks,
    fits_one_launch,
    gram_triton,
    last_pick,
)
from vtc.kernels._tiles import inverse_norm_triton

DEPENDENT = 1e-6


def dpp_map(
    kernel: Float[Tensor, "B N N"] | tuple[Float[Tensor, "B N D"], Float[Tensor, "B N"]],
    k: int,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    impl: str | None = None,
) -> Int64[Tensor, "B K"]:
    """Indices of `k` tokens in pick order, from an explicit kernel or from a pair (features, quality).

    >>> dpp_map(torch.diag_embed(torch.tensor([[1.0, 3.0, 2.0]])), 2).tolist()
    [[1, 2]]
    """
    if isinstance(kernel, tuple):
        return dpp_map_features(kernel[0], kernel[1], k, mask=mask, impl=impl)
    if k < 0:
        raise ValueError(f"k={k} for dpp_map: it must be 0 or more.")
    if impl == "reference":
        return reference(kernel, k, mask)
    picks: Tensor = _kernel_operator(kernel, k, mask, impl)
    return picks


def dpp_map_features(
    x: Float[Tensor, "B N D"],
    quality: Float[Tensor, "B N"],
    k: int,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    impl: str | None = None,
) -> Int64[Tensor, "B K"]:
    """`dpp_map` of K_ij = quality_i cos(x_i, x_j) quality_j, whose rows are computed when they are needed.

    >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    >>> dpp_map_features(x, torch.tensor([[1.0, 0.9, 0.5]]), 2).tolist()
    [[0, 2]]
    """
    if k < 0:
        raise ValueError(f"k={k} for dpp_map_features: it must be 0 or more.")
    if impl == "reference":
        return reference_features(x, quality, k, mask)
    picks: Tensor = _operator(x, quality, k, mask, impl)
    return picks


def cost(batch: int, num_tokens: int, width: int, k: int, *, itemsize: int = 4) -> Cost:
    """FLOPs of K kernel rows (width 0: an explicit kernel) and of the K (K - 1) / 2 updates; bytes of the rows read."""
    flops = 2 * batch * num_tokens * (k * width + k * (k - 1) // 2)
    row = width * itemsize if width else 4
    return Cost(flops, batch * num_tokens * (k * row + 4 * k * (k - 1) // 2))


def reference(kernel: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """The definition, on the whole kernel, by Schur complements instead of the recursion."""
    conditional = kernel.to(accumulator(kernel))
    start = conditional.diagonal(dim1=1, dim2=2)
    available = torch.ones_like(start, dtype=torch.bool) if mask is None else mask
    picks = torch.full((kernel.shape[0], k), -1, dtype=torch.int64, device=kernel.device)
    for step in range(min(k, kernel.shape[1])):
        variance = conditional.diagonal(dim1=1, dim2=2)
        best, pick = variance.masked_fill(~available, float("-inf")).max(dim=-1)
        picks[:, step] = torch.where(best > float("-inf"), pick, -1)
        at = pick[:, None]
        row = torch.take_along_dim(conditional, at[..., None], dim=1)[:, 0]
        own = torch.take_along_dim(start, at, dim=1)
        is_new = best[:, None] > DEPENDENT * own
        row = torch.where(is_new, row / best.clamp(min=torch.finfo(row.dtype).tiny).sqrt()[:, None], 0.0)
        conditional = conditional - row[:, :, None] * row[:, None]
        available = available.scatter(1, at, False)
    return picks


def reference_features(x: Tensor, quality: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """`reference` on K_ij = quality_i cos(x_i, x_j) quality_j."""
    scaled = normalise(x) * quality.to(accumulator(x))[..., None]
    return reference(scaled @ scaled.transpose(1, 2), k, mask)


def _greedy(row_of: Callable[[Tensor], Tensor], diagonal: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """The recursion on rows that `row_of(pick)` yields; c_t is kept as [B, t, N]."""
    batch, num_tokens = diagonal.shape
    steps = min(k, num_tokens)
    picks = torch.full((batch, k), -1, dtype=torch.int64, device=diagonal.device)
    factors = diagonal.new_zeros((batch, max(0, steps - 1), num_tokens))
    variance = diagonal.clone() if mask is None else diagonal.masked_fill(~mask, float("-inf"))
    for step in range(steps):
        best, pick = variance.max(dim=-1, keepdim=True)
        picks[:, step] = torch.where(best > float("-inf"), pick, -1)[:, 0]
        if step + 1 == steps:
            break
        row = row_of(pick[:, 0])
        if step:
            earlier = factors[:, :step]
            at_pick = torch.take_along_dim(earlier, pick[..., None], dim=2)
            row = row - torch.bmm(at_pick.transpose(1, 2), earlier)[:, 0]
        is_new = best > DEPENDENT * torch.take_along_dim(diagonal, pick, dim=1)
        row = torch.where(is_new, row * best.clamp(min=torch.finfo(row.dtype).tiny).rsqrt(), 0.0)
        factors[:, step] = row
        variance = (variance - row * row).scatter_(1, pick, float("-inf"))
    return picks


def _torch(x: Tensor, quality: Tensor, k: int, mask: Tensor | None) -> Tensor:
    inverse = inverse_norm(x)
    weight = quality.to(inverse.dtype)

    def row_of(pick: Tensor) -> Tensor:
        return cosine_to(x, inverse, pick) * weight * torch.take_along_dim(weight, pick[:, None], dim=1)

    return _greedy(row_of, torch.where(inverse > 0, weight * weight, 0.0), k, mask)


def _kernel_torch(kernel: Tensor, k: int, mask: Tensor | None) -> Tensor:
    def row_of(pick: Tensor) -> Tensor:
        return torch.take_along_dim(kernel, pick[:, None, None], dim=1)[:, 0].to(accumulator(kernel))

    return _greedy(row_of, kernel.diagonal(dim1=1, dim2=2).to(accumulator(kernel)), k, mask)


@lazy_jit
@no_type_check
def _one_launch_kernel(
    kernel,
    quality,
    diagonal,
    variance,
    factors,
    picks,
    num_tokens,
    k,
    steps,
    dependent,
    kernel_batch,
    kernel_row,
    kernel_step,
    HAS_QUALITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All steps of one sample; the conditional variances stay in registers, the factors c_t in `factors` [B, t, N]."""
    sample = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK).to(tl.int64)
    ok = at < num_tokens
    left = tl.load(variance + sample * num_tokens + at, mask=ok, other=float("-inf"))
    own = tl.load(diagonal + sample * num_tokens + at, mask=ok, other=0.0)
    factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if HAS_QUALITY:
        factor = tl.load(quality + sample * num_tokens + at, mask=ok, other=0.0)
    c = factors + sample * (steps - 1) * num_tokens
    for step in range(0, steps):
        best, found = tl.max(left, axis=0, return_indices=True)
        pick = found.to(tl.int64)
        tl.store(picks + sample * k + step, tl.where(best > float("-inf"), pick, -1))
        if step + 1 < steps:
            row_at = kernel + sample * kernel_batch + pick * kernel_row + at * kernel_step
            row = tl.load(row_at, mask=ok, other=0.0).to(tl.float32) * factor
            is_pick = at == pick
            row = row * tl.sum(tl.where(is_pick, factor, 0.0), axis=0)
            for earlier in range(0, step):
                at_pick = tl.load(c + earlier * num_tokens + pick)
                row -= at_pick * tl.load(c + earlier * num_tokens + at, mask=ok, other=0.0)
            is_new = best > dependent * tl.sum(tl.where(is_pick, own, 0.0), axis=0)
            row = tl.where(is_new, row / tl.sqrt(tl.where(is_new, best, 1.0)), 0.0)
            tl.store(c + step * num_tokens + at, row, mask=ok)
            left = tl.where(is_pick, float("-inf"), left - row * row)
            tl.debug_barrier()


@lazy_jit
@no_type_check
def _step_kernel(
    x,
    inverse,
    quality,
    diagonal,
    variance,
    factors,
    picks,
    best_in,
    pick_in,
    best_out,
    pick_out,
    num_tokens,
    width,
    k,
    step,
    steps,
    num_blocks,
    dependent,
    x_batch,
    x_row,
    x_step,
    IS_KERNEL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One step for a block of tokens; `x` holds features, or with IS_KERNEL the kernel itself."""
    sample = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    blocks_at = sample * num_blocks
    best, found = best_of_blocks(best_in + blocks_at, pick_in + blocks_at, num_blocks, BLOCKS)
    pick = found.to(tl.int64)
    if block == 0:
        tl.store(picks + sample * k + step, tl.where(best > float("-inf"), pick, -1))
    rows = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = rows < num_tokens
    tokens = sample * num_tokens
    if IS_KERNEL:
        row_at = x + sample * x_batch + pick * x_row + rows * x_step
        row = tl.load(row_at, mask=ok, other=0.0).to(tl.float32)
    else:
        row = cosines_with(x + sample * x_batch, inverse + tokens, pick, rows, ok, width, x_row, x_step, BLOCK, BLOCK_D)
        row = row * tl.load(quality + tokens + rows, mask=ok, other=0.0) * tl.load(quality + tokens + pick)
    c = factors + sample * (steps - 1) * num_tokens
    for earlier in range(0, step):
        at_pick = tl.load(c + earlier * num_tokens + pick)
        row -= at_pick * tl.load(c + earlier * num_tokens + rows, mask=ok, other=0.0)
    is_new = best > dependent * tl.load(diagonal + tokens + pick)
    row = tl.where(is_new, row / tl.sqrt(tl.where(is_new, best, 1.0)), 0.0)
    tl.store(c + step * num_tokens + rows, row, mask=ok)
    left = tl.load(variance + tokens + rows, mask=ok, other=float("-inf"))
    left = tl.where(rows == pick, float("-inf"), left - row * row)
    tl.store(variance + tokens + rows, left, mask=ok)
    top, at = tl.max(left, axis=0, return_indices=True)
    tl.store(best_out + blocks_at + block, top)
    tl.store(pick_out + blocks_at + block, block * BLOCK + at)


def _greedy_triton(
    source: Tensor, inverse: Tensor | None, quality: Tensor | None, diagonal: Tensor, k: int, mask: Tensor | None
) -> Tensor:
    """Rows from the features in `source` (with `inverse` and `quality`), or from the kernel that `source` is."""
    batch, num_tokens = diagonal.shape
    steps = min(k, num_tokens)
    picks = torch.full((batch, k), -1, dtype=torch.int64, device=source.device)
    diagonal = diagonal.contiguous()
    variance = (diagonal.clone() if mask is None else diagonal.masked_fill(~mask, float("-inf"))).contiguous()
    factors = torch.empty((batch, max(1, steps - 1), num_tokens), dtype=torch.float32, device=source.device)
    score = diagonal if quality is None else quality
    state = (score, diagonal, variance, factors, picks)
    fits = num_tokens <= LARGEST_IN_REGISTERS if inverse is None else fits_one_launch(source)
    if fits:
        kernel = source if inverse is None else gram_triton(source, inverse)
        block = max(16, next_power_of_two(num_tokens))
        _one_launch_kernel[(batch,)](
            kernel,
            *state,
            num_tokens,
            k,
            steps,
            DEPENDENT,
            *kernel.stride(),
            HAS_QUALITY=quality is not None,
            BLOCK=block,
            num_warps=min(32, max(4, block // 512)),
        )
        return picks
    best, pick = first_blocks(variance)
    next_best, next_pick = torch.empty_like(best), torch.empty_like(pick)
    num_blocks, width = best.shape[1], source.shape[2]
    for step in range(steps - 1):
        _step_kernel[(num_blocks, batch)](
            source,
            score if inverse is None else inverse,
            *state,
            best,
            pick,
            next_best,
            next_pick,
            num_tokens,
            width,
            k,
            step,
            steps,
            num_blocks,
            DEPENDENT,
            *source.stride(),
            IS_KERNEL=inverse is None,
            BLOCKS=next_power_of_two(num_blocks),
            BLOCK=STEP_BLOCK,
            BLOCK_D=min(256, max(16, next_power_of_two(width))),
        )
        best, pick, next_best, next_pick = next_best, next_pick, best, pick
    picks[:, steps - 1] = last_pick(best, pick)
    return picks


def _triton(x: Tensor, quality: Tensor, k: int, mask: Tensor | None) -> Tensor:
    if x.numel() == 0 or k == 0:
        return _torch(x, quality, k, mask)
    inverse = inverse_norm_triton(x)
    weight = quality.to(torch.float32).contiguous()
    return _greedy_triton(x, inverse, weight, torch.where(inverse > 0, weight * weight, 0.0), k, mask)


def _kernel_triton(kernel: Tensor, k: int, mask: Tensor | None) -> Tensor:
    if kernel.numel() == 0 or k == 0:
        return _kernel_torch(kernel, k, mask)
    return _greedy_triton(kernel, None, None, kernel.diagonal(dim1=1, dim2=2).to(torch.float32), k, mask)


def _fake(x: Tensor, quality: Tensor, k: int, mask: Any, impl: str | None) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _flops(x: Any, quality: Any, k: int, mask: Any, impl: str | None) -> int:
    return cost(x[0], x[1], x[2], k).flops


@register("dpp_map_features", fake=_fake, flops=_flops)
def _operator(x: Tensor, quality: Tensor, k: int, mask: Tensor | None, impl: str | None) -> Tensor:
    run = _triton if choose_path(x, impl).name == "triton" else _torch
    return run(x, quality, k, mask)


def _kernel_fake(kernel: Tensor, k: int, mask: Any, impl: str | None) -> Tensor:
    return kernel.new_empty((kernel.shape[0], k), dtype=torch.int64)


def _kernel_flops(kernel: Any, k: int, mask: Any, impl: str | None) -> int:
    return cost(kernel[0], kernel[1], 0, k).flops


@register("dpp_map", fake=_kernel_fake, flops=_kernel_flops)
def _kernel_operator(kernel: Tensor, k: int, mask: Tensor | None, impl: str | None) -> Tensor:
    run = _kernel_triton if choose_path(kernel, impl).name == "triton" else _kernel_torch
    return run(kernel, k, mask)
