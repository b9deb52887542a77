"""How similar a token is to all others, and one step of propagation over the similarity graph.

    degree[b, i] = sum over valid j of f(s_ij),   s_ij = cos(x_i, x_j),   s_ii = 1 exactly (0 for a zero vector)

`similarity_degree` has f = identity (`sum`, `mean`), the identity above a threshold, or the indicator `s >= threshold`
(`count`). Without a threshold the sum is `x^_i . sum_j x^_j` (x^ = x / |x|) and costs O(N D); with one, every pair is
visited and no N x N matrix is stored. `similarity_propagate` applies W(x) to a vector, W recomputed on the fly or kept
within O(N D) between its steps.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vtc.kernels._cosine import WORKSPACE_BYTES, accumulator, chunks, inverse_norm, normalise
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._graph import EXPONENTIAL, IDENTITY, INDICATOR, Graph, edge_weight
from vtc.kernels._greedy import gram_triton, has_linear_gram
from vtc.kernels._tiles import dot_tile, inverse_norm_triton, split_columns, tile_blocks

REDUCTIONS = ("sum", "mean", "count")
RECOMPUTED_PASSES = 2  # on a device; for more, reading a stored matrix is expected to cost less (not measured)


def similarity_degree(
    x: Float[Tensor, "B N D"],
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    reduce: str = "sum",
    threshold: float | None = None,
    include_self: bool = True,
    impl: str | None = None,
) -> Float[Tensor, "B N"]:
    """Sum, mean or count of the cosine similarities of each token with the valid tokens; 0 for invalid tokens.

    With a `threshold`, similarities below it count as 0; `count` needs one and counts `s >= threshold`. `mean` divides
    by the number of valid tokens compared with (the token itself only with `include_self`).

    >>> similarity_degree(torch.eye(2)[None, [0, 0, 1]], reduce="count", threshold=0.5)
    tensor([[2., 2., 1.]])
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} for similarity_degree: choose one of {', '.join(REDUCTIONS)}.")
    if reduce == "count" and threshold is None:
        raise ValueError("reduce='count' for similarity_degree needs a threshold, for example threshold=0.5.")
    if impl == "reference":
        return reference(x, mask, reduce, threshold, include_self)
    degree: Tensor = _degree_operator(x, mask, reduce, threshold, include_self, impl)
    return degree


def similarity_propagate(
    x: Float[Tensor, "B N D"],
    y: Float[Tensor, "B N"],
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    threshold: float | None = None,
    temperature: float | None = None,
    steps: int = 1,
    transpose: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B N"]:
    """W(x)^steps y, where W is the graph of cosine similarities, itself included.

    Without `temperature`, W_ij = s_ij if s_ij >= threshold else 0. With it, row i of W is the softmax of
    s_ij / temperature over the neighbours s_ij >= threshold (no threshold: over all valid tokens), and zero vectors
    have no neighbours. `transpose` lets values flow along the rows into the columns: y W. G-Prune's propagation is
    `threshold=0.5, temperature=0.03, steps=5, transpose=True`. Invalid tokens neither give nor receive. Memory stays
    O(N D): between the steps W is kept as far as that allows, and recomputed otherwise.

    >>> similarity_propagate(torch.eye(2)[None, [0, 0, 1]], torch.tensor([[1.0, 2.0, 4.0]]))
    tensor([[3., 3., 4.]])
    """
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature={temperature} for similarity_propagate: it must be above 0, for example 0.03.")
    if steps < 0:
        raise ValueError(f"steps={steps} for similarity_propagate: it must be 0 or more.")
    if impl == "reference":
        return propagate_reference(x, y, mask, threshold, temperature, steps, transpose)
    result: Tensor = _propagate_operator(x, y, mask, threshold, temperature, steps, transpose, impl)
    return result


def cost(batch: int, num_tokens: int, width: int, *, passes: int, itemsize: int = 4) -> Cost:
    """`passes` visits of all pairs; 0 passes is the closed form of the plain sum, which reads the input twice."""
    pairs = num_tokens * num_tokens if passes else 2 * num_tokens
    flops = 2 * batch * width * (max(1, passes) * pairs + num_tokens)
    return Cost(flops, batch * num_tokens * (width * itemsize * (1 if passes else 2) + 4))


def reference(x: Tensor, mask: Tensor | None, reduce: str, threshold: float | None, include_self: bool) -> Tensor:
    """The definition, with the whole similarity matrix."""
    similarity = _exact_similarity(x)
    weight = similarity.new_ones(similarity.shape)
    if threshold is not None:
        weight = (similarity >= threshold).to(similarity.dtype)
    if not include_self:
        weight = weight * (1 - torch.eye(x.shape[1], dtype=weight.dtype, device=x.device))
    valid = _valid(x, mask).to(similarity.dtype)
    terms = weight if reduce == "count" else weight * similarity
    degree = (terms * valid[:, None]).sum(dim=-1) * valid
    return _mean(degree, valid, include_self) if reduce == "mean" else degree


def propagate_reference(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    threshold: float | None,
    temperature: float | None,
    steps: int,
    transpose: bool,
) -> Tensor:
    """The definition, with the whole graph and a masked softmax per row."""
    similarity = _exact_similarity(x)
    valid = _valid(x, mask)
    if temperature is not None:
        valid = valid & (x != 0).any(dim=-1)
    edge = valid[:, None] & valid[:, :, None]
    if threshold is not None:
        edge = edge & (similarity >= threshold)
    if temperature is None:
        weight = torch.where(edge, similarity, 0.0)
    else:
        logits = (similarity / temperature).masked_fill(~edge, float("-inf"))
        weight = torch.where(edge, torch.softmax(logits, dim=-1), 0.0)
    if transpose:
        weight = weight.transpose(1, 2)
    y = y.to(similarity.dtype)[..., None]
    for _ in range(steps):
        y = weight @ y
    return torch.where(_valid(x, mask), y[..., 0], 0.0)


def _exact_similarity(x: Tensor) -> Tensor:
    unit = normalise(x)
    similarity = unit @ unit.transpose(1, 2)
    own = (x != 0).any(dim=-1).to(similarity.dtype)
    return similarity - torch.diag_embed(similarity.diagonal(dim1=1, dim2=2)) + torch.diag_embed(own)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask


def _mean(degree: Tensor, valid: Tensor, include_self: bool) -> Tensor:
    count = valid.sum(dim=-1, keepdim=True) - (0 if include_self else 1)
    return degree / count.clamp(min=1)


def _torch(x: Tensor, mask: Tensor | None, reduce: str, threshold: float | None, include_self: bool) -> Tensor:
    inverse = inverse_norm(x)
    valid = _valid(x, mask).to(inverse.dtype)
    if threshold is None:
        degree = (
            linear_similarity(x, inverse, valid)
            if include_self
            else linear_similarity(x, inverse, valid) - valid * (inverse > 0)
        )
    else:
        kind = INDICATOR if reduce == "count" else IDENTITY
        degree = Graph(x, inverse, kind, threshold, 1.0, include_self=include_self).apply(valid)
    degree = degree * valid
    return _mean(degree, valid, include_self) if reduce == "mean" else degree


def linear_similarity(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """sum_j s_ij w_j as x^_i . (sum_j w_j x^_j): two readings of x."""
    scale = (inverse * weight)[:, None]
    step = x.shape[1] if x.dtype == inverse.dtype else WORKSPACE_BYTES // (4 * max(1, x.shape[0] * x.shape[2]))
    total = torch.zeros(x.shape[0], 1, x.shape[2], dtype=inverse.dtype, device=x.device)
    result = torch.empty_like(inverse)
    for rows in chunks(x.shape[1], max(1, step)):
        total += torch.bmm(scale[..., rows], x[:, rows].to(inverse.dtype))
    for rows in chunks(x.shape[1], max(1, step)):
        result[:, rows] = torch.bmm(x[:, rows].to(inverse.dtype), total.transpose(1, 2))[..., 0]
    return result * inverse


def _propagate_with(
    apply: Any,
    inverse: Tensor,
    y: Tensor,
    valid: Tensor,
    temperature: float | None,
    steps: int,
    transpose: bool,
) -> Tensor:
    """The steps in terms of `apply(w)` = F w. Cosines never exceed 1, so the softmax's shift is the constant 1."""
    y = torch.where(valid, y.to(inverse.dtype), 0.0)
    weight = valid.to(inverse.dtype)
    if temperature is None:
        for _ in range(steps):
            y = apply(y) * weight
        return y
    if steps == 0:
        return y
    weight = weight * (inverse > 0)
    total = apply(weight)
    scale = torch.where(total * weight > 0, total.reciprocal(), 0.0)
    for _ in range(steps):
        y = apply(y * scale) * weight if transpose else apply(y * weight) * scale
    return y


def _propagate_torch(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    threshold: float | None,
    temperature: float | None,
    steps: int,
    transpose: bool,
) -> Tensor:
    inverse = inverse_norm(x)
    kind = IDENTITY if temperature is None else EXPONENTIAL
    graph = Graph(x, inverse, kind, threshold, temperature or 1.0, keep=_passes(temperature, steps) > 1)

    def apply(weight: Tensor) -> Tensor:
        is_linear = threshold is None and temperature is None
        return linear_similarity(x, inverse, weight) if is_linear else graph.apply(weight)

    return _propagate_with(apply, inverse, y, _valid(x, mask), temperature, steps, transpose)


def _passes(temperature: float | None, steps: int) -> int:
    """How often the matrix is applied: once per step, and once for the row sums of the softmax."""
    return steps + (temperature is not None and steps > 0)


@lazy_jit
@no_type_check
def _apply_kernel(
    x,
    inverse,
    weight,
    partial,
    num_tokens,
    width,
    per_split,
    threshold,
    shrink,
    x_batch,
    x_row,
    x_step,
    KIND: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_j f(s_ij) w_j of a block of rows over one split of the columns; `shrink` is 1 / temperature."""
    sample = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    rows = (tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    rows_ok = rows < num_tokens
    at_sample = x + sample * x_batch
    row_inverse = tl.load(inverse + sample * num_tokens + rows, mask=rows_ok, other=0.0)
    total = tl.zeros((BLOCK_X,), dtype=tl.float32)
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, num_tokens), BLOCK_Y):
        columns = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
        ok = columns < num_tokens
        tile = dot_tile(
            at_sample + rows * x_row,
            at_sample + columns * x_row,
            rows_ok,
            ok,
            x_step,
            x_step,
            width,
            BLOCK_X,
            BLOCK_Y,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
        column_inverse = tl.load(inverse + sample * num_tokens + columns, mask=ok, other=0.0)
        tile = tile * row_inverse[:, None] * column_inverse[None, :]
        is_own = rows[:, None] == columns[None, :]
        tile = tl.where(is_own, tl.where(row_inverse > 0, 1.0, 0.0)[:, None], tile)
        kept = ok[None, :]
        if HAS_THRESHOLD:
            kept = kept & (tile >= threshold)
        if not INCLUDE_SELF:
            kept = kept & (is_own == 0)
        if KIND == 1:
            tile = tile * 0.0 + 1.0
        if KIND == 2:
            tile = tl.exp((tile - 1.0) * shrink)
        column_weight = tl.load(weight + sample * num_tokens + columns, mask=ok, other=0.0)
        total += tl.sum(tl.where(kept, tile, 0.0) * column_weight[None, :], axis=1)
    tl.store(partial + (split * tl.num_programs(1) + sample) * num_tokens + rows, total, mask=rows_ok)


def _apply_triton(
    x: Tensor,
    inverse: Tensor,
    weight: Tensor,
    kind: int,
    threshold: float | None,
    temperature: float,
    include_self: bool = True,
) -> Tensor:
    batch, num_tokens, width = x.shape
    blocks = tile_blocks(x)
    row_blocks = cdiv(num_tokens, blocks["BLOCK_X"])
    splits, per_split = split_columns(row_blocks * batch, num_tokens, blocks["BLOCK_Y"])
    partial = torch.empty((splits, batch, num_tokens), dtype=torch.float32, device=x.device)
    _apply_kernel[(row_blocks, batch, splits)](
        x,
        inverse,
        weight.contiguous(),
        partial,
        num_tokens,
        width,
        per_split,
        0.0 if threshold is None else float(threshold),
        1.0 / temperature,
        *x.stride(),
        KIND=kind,
        HAS_THRESHOLD=threshold is not None,
        INCLUDE_SELF=include_self,
        **blocks,
    )
    return partial.sum(dim=0)


@lazy_jit
@no_type_check
def _weighted_total_kernel(
    x, scale, partial, num_tokens, width, x_batch, x_row, x_step, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """partial[b, block, :] = sum over the block's tokens of scale x."""
    sample = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    ok = rows < num_tokens
    factor = tl.load(scale + sample * num_tokens + rows, mask=ok, other=0.0)
    at = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    at_tile = x + sample * x_batch + rows[:, None] * x_row + at[None, :] * x_step
    tile = tl.load(at_tile, mask=ok[:, None] & (at < width)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(tile * factor[:, None], axis=0)
    tl.store(partial + (sample * tl.num_programs(0) + block) * width + at, total, mask=at < width)


@lazy_jit
@no_type_check
def _dot_kernel(
    x,
    vector,
    inverse,
    result,
    num_tokens,
    width,
    x_batch,
    x_row,
    x_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """result[b, n] = inverse[b, n] * dot(x[b, n], vector[b])."""
    sample = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    ok = rows < num_tokens
    at_row = x + sample * x_batch + rows * x_row
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        tile = tl.load(at_row[:, None] + at[None, :] * x_step, mask=ok[:, None] & (at < width)[None, :], other=0.0)
        part = tl.load(vector + sample * width + at, mask=at < width, other=0.0)
        total += tl.sum(tile.to(tl.float32) * part[None, :], axis=1)
    scale = tl.load(inverse + sample * num_tokens + rows, mask=ok, other=0.0)
    tl.store(result + sample * num_tokens + rows, total * scale, mask=ok)


def linear_triton(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """sum_j s_ij w_j in two readings of x."""
    batch, num_tokens, width = x.shape
    block = min(256, max(16, next_power_of_two(width)))
    row_blocks = cdiv(num_tokens, 64)
    partial = torch.empty((batch, row_blocks, width), dtype=torch.float32, device=x.device)
    scale = (inverse * weight).contiguous()
    grid = (row_blocks, batch, cdiv(width, block))
    _weighted_total_kernel[grid](x, scale, partial, num_tokens, width, *x.stride(), BLOCK_ROWS=64, BLOCK_D=block)
    result = torch.empty_like(inverse)
    _dot_kernel[(cdiv(num_tokens, 16), batch)](
        x, partial.sum(dim=1), inverse, result, num_tokens, width, *x.stride(), BLOCK_ROWS=16, BLOCK_D=block
    )
    return result


def _triton(x: Tensor, mask: Tensor | None, reduce: str, threshold: float | None, include_self: bool) -> Tensor:
    if x.numel() == 0:
        return _torch(x, mask, reduce, threshold, include_self)
    inverse = inverse_norm_triton(x)
    valid = _valid(x, mask).to(inverse.dtype)
    if threshold is None:
        degree = linear_triton(x, inverse, valid)
        degree = degree if include_self else degree - valid * (inverse > 0)
    else:
        kind = INDICATOR if reduce == "count" else IDENTITY
        degree = _apply_triton(x, inverse, valid, kind, threshold, 1.0, include_self)
    degree = degree * valid
    return _mean(degree, valid, include_self) if reduce == "mean" else degree


def _propagate_triton(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    threshold: float | None,
    temperature: float | None,
    steps: int,
    transpose: bool,
) -> Tensor:
    if x.numel() == 0:
        return _propagate_torch(x, y, mask, threshold, temperature, steps, transpose)
    inverse = inverse_norm_triton(x)
    kind = IDENTITY if temperature is None else EXPONENTIAL
    is_linear = threshold is None and temperature is None
    is_stored = not is_linear and _passes(temperature, steps) > RECOMPUTED_PASSES and has_linear_gram(x)
    matrix = _stored_triton(x, inverse, kind, threshold, temperature or 1.0) if is_stored else None

    def apply(weight: Tensor) -> Tensor:
        if matrix is not None:
            return torch.bmm(matrix, weight[..., None])[..., 0]
        if is_linear:
            return linear_triton(x, inverse, weight)
        return _apply_triton(x, inverse, weight, kind, threshold, temperature or 1.0)

    return _propagate_with(apply, inverse, y, _valid(x, mask), temperature, steps, transpose)


def _stored_triton(x: Tensor, inverse: Tensor, kind: int, threshold: float | None, temperature: float) -> Tensor:
    """f(s_ij) for all pairs, [B, N, N] float32."""
    matrix = gram_triton(x, inverse)
    matrix.diagonal(dim1=1, dim2=2).copy_(inverse > 0)
    return edge_weight(matrix, kind, threshold, temperature)


def _fake(x: Tensor, mask: Any, reduce: str, threshold: Any, include_self: bool, impl: str | None) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulator(x))


def _flops(x: Any, mask: Any, reduce: str, threshold: Any, include_self: bool, impl: str | None) -> int:
    return cost(*x, passes=0 if threshold is None else 1).flops


@register("similarity_degree", fake=_fake, flops=_flops)
def _degree_operator(
    x: Tensor, mask: Tensor | None, reduce: str, threshold: float | None, include_self: bool, impl: str | None
) -> Tensor:
    run = _triton if choose_path(x, impl).name == "triton" else _torch
    return run(x, mask, reduce, threshold, include_self)


def _propagate_fake(x: Tensor, y: Any, mask: Any, *options: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulator(x))


def _propagate_flops(
    x: Any, y: Any, mask: Any, threshold: Any, temperature: Any, steps: int, transpose: bool, impl: str | None
) -> int:
    if threshold is None and temperature is None:
        return steps * cost(*x, passes=0).flops
    return cost(*x, passes=steps + (temperature is not None)).flops


@register("similarity_propagate", fake=_propagate_fake, flops=_propagate_flops)
def _propagate_operator(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    threshold: float | None,
    temperature: float | None,
    steps: int,
    transpose: bool,
    impl: str | None,
) -> Tensor:
    run = _propagate_triton if choose_path(x, impl).name == "triton" else _propagate_torch
    return run(x, y, mask, threshold, temperature, steps, transpose)
