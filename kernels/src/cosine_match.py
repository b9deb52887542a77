"""Best cosine target of every source token, without the N x M matrix in memory.

    value[b, n, 0] = max over valid m of cos(source[b, n], target[b, m]),   index = that m

Ties go to the lowest index. A zero vector has similarity 0 to everything. Slots without a valid target hold -inf and
index -1; a source row that is masked out holds 0 and index -1. `bipartite_match` is ToMe's form: even tokens look for
their best odd token. Work: 2 B N M D FLOPs; memory beside the result: O(N + M) and one tile.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vtc.kernels._cosine import accumulator, cosine_tiles, inverse_norm, masked_columns, normalise, top_first
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._tiles import dot_tile, inverse_norm_triton, split_columns, tile_blocks

MOST_IN_REGISTERS = 32


def cosine_match(
    source: Float[Tensor, "B N D"],
    target: Float[Tensor, "B M D"],
    *,
    source_mask: Bool[Tensor, "B N"] | None = None,
    target_mask: Bool[Tensor, "B M"] | None = None,
    topk: int = 1,
    impl: str | None = None,
) -> tuple[Float[Tensor, "B N K"], Int64[Tensor, "B N K"]]:
    """Values (float32, descending) and indices of the `topk` most similar targets of every source.

    `impl` is `"reference"`, `"torch"`, `"triton"` or None (see `choose_path`); it never changes the result's meaning.

    >>> values, index = cosine_match(torch.eye(3)[None], torch.eye(3)[None, [2, 1]])
    >>> index[0, :, 0].tolist()
    [0, 1, 0]
    """
    if topk < 1:
        raise ValueError(f"topk={topk} for cosine_match: at least one target per source is needed. Use topk>=1.")
    if impl == "reference":
        return reference(source, target, source_mask, target_mask, topk)
    values, index = _operator(source, target, source_mask, target_mask, topk, impl)
    return values, index


def bipartite_match(
    metric: Float[Tensor, "B N D"],
    *,
    num_protected: int = 0,
    mask: Bool[Tensor, "B N"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Tensor, "B S"], Int64[Tensor, "B S"]]:
    """Best odd token for every even token: source s is token 2s, target t is token 2t + 1.

    The first `num_protected` tokens (CLS, distillation) and tokens outside `mask` are neither source nor target. A
    source that has no partner holds -inf and index -1, so that a descending sort puts it last.

    >>> bipartite_match(torch.eye(4)[None, [0, 0, 1, 1]])[1].tolist()
    [[0, 1]]
    """
    num_tokens = metric.shape[1]
    free = torch.arange(num_tokens, device=metric.device) >= num_protected
    free = free.expand(metric.shape[:2]) if mask is None else free & mask
    values, index = cosine_match(
        metric[:, ::2],
        metric[:, 1::2],
        source_mask=free[:, ::2],
        target_mask=free[:, 1::2],
        impl=impl,
    )
    values, index = values[..., 0], index[..., 0]
    return values.masked_fill(index < 0, float("-inf")), index


def cost(batch: int, num_sources: int, num_targets: int, width: int, itemsize: int = 4) -> Cost:
    """FLOPs of the dot products and norms; bytes of reading both inputs once and writing one match."""
    flops = 2 * batch * width * (num_sources * num_targets + num_sources + num_targets)
    return Cost(flops, batch * ((num_sources + num_targets) * width * itemsize + 12 * num_sources))


def reference(
    source: Tensor, target: Tensor, source_mask: Tensor | None, target_mask: Tensor | None, topk: int
) -> tuple[Tensor, Tensor]:
    """The definition, with the whole similarity matrix."""
    similarity = normalise(source) @ normalise(target).transpose(1, 2)  # [B, N, M]
    if target_mask is not None:
        similarity = similarity.masked_fill(~target_mask[:, None], float("-inf"))
    missing = max(0, topk - target.shape[1])
    similarity = torch.nn.functional.pad(similarity, (0, missing), value=float("-inf"))
    values, index = top_first(similarity, topk)
    return _close(values, index, source_mask)


def _close(values: Tensor, index: Tensor, source_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Index -1 where there is no target, value 0 and index -1 for masked sources."""
    index = index.masked_fill(values == float("-inf"), -1)
    if source_mask is not None:
        values = values.masked_fill(~source_mask[..., None], 0.0)
        index = index.masked_fill(~source_mask[..., None], -1)
    return values, index


def _torch(
    source: Tensor, target: Tensor, source_mask: Tensor | None, target_mask: Tensor | None, topk: int
) -> tuple[Tensor, Tensor]:
    """Tile by tile; tiles visit the targets in ascending order, so that an equal later value never wins."""
    shape = (*source.shape[:2], topk)
    values = source.new_full(shape, float("-inf"), dtype=accumulator(source))
    index = torch.full(shape, -1, dtype=torch.int64, device=source.device)
    for samples, rows, columns, tile in cosine_tiles(source, target, None, inverse_norm(target)):
        masked_columns(tile, None if target_mask is None else target_mask[samples, columns])
        best, where = top_first(tile, min(topk, tile.shape[-1]))
        del tile  # its memory is free for the next one
        where = where + columns.start
        old_values, old_index = values[samples, rows], index[samples, rows]
        if topk == 1:
            better = best > old_values
            values[samples, rows] = torch.where(better, best, old_values)
            index[samples, rows] = torch.where(better, where, old_index)
        else:
            best, order = top_first(torch.cat([old_values, best], dim=-1), topk)
            values[samples, rows] = best
            index[samples, rows] = torch.cat([old_index, where], dim=-1).gather(-1, order)
    return _close(torch.where(index < 0, values, values * inverse_norm(source)[..., None]), index, source_mask)


@lazy_jit
@no_type_check
def _match_kernel(
    source,
    target,
    inverse,
    target_mask,
    values,
    index,
    num_sources,
    num_targets,
    width,
    per_split,
    source_batch,
    source_row,
    source_step,
    target_batch,
    target_row,
    target_step,
    mask_batch,
    mask_step,
    HAS_MASK: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Best targets of a block of sources within one split of the targets; SLOTS is TOPK as a power of two."""
    sample = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    rows = (tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    rows_ok = rows < num_sources
    at_rows = source + sample * source_batch + rows * source_row
    slots = tl.arange(0, SLOTS)
    empty = tl.where(slots < TOPK, float("-inf"), float("inf"))
    best = tl.zeros((BLOCK_X, SLOTS), dtype=tl.float32) + empty[None, :]
    where = tl.zeros((BLOCK_X, SLOTS), dtype=tl.int32) - 1
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, num_targets), BLOCK_Y):
        columns = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
        ok = columns < num_targets
        at_columns = target + sample * target_batch + columns * target_row
        tile = dot_tile(
            at_rows,
            at_columns,
            rows_ok,
            ok,
            source_step,
            target_step,
            width,
            BLOCK_X,
            BLOCK_Y,
            BLOCK_D,
            UPCAST,
            PRECISION,
        )
        scale = tl.load(inverse + sample * num_targets + columns, mask=ok, other=0.0)[None, :]
        if SKIP_SELF:
            scale = scale * tl.load(inverse + sample * num_targets + rows, mask=rows_ok, other=0.0)[:, None]
        tile = tile * scale
        if HAS_MASK:
            ok = ok & tl.load(target_mask + sample * mask_batch + columns * mask_step, mask=ok, other=0).to(tl.int1)
        seen = ok[None, :]
        if SKIP_SELF:
            seen = seen & (rows[:, None] != columns[None, :])
        tile = tl.where(seen, tile, float("-inf"))
        for _ in range(TOPK):
            top, at = tl.max(tile, axis=1, return_indices=True)
            tile = tl.where(tl.arange(0, BLOCK_Y)[None, :] == at[:, None], float("-inf"), tile)
            least = tl.min(best, axis=1)
            last = tl.max(tl.where(best == least[:, None], where * SLOTS + slots[None, :], -SLOTS), axis=1)
            out = (best == least[:, None]) & (where * SLOTS + slots[None, :] == last[:, None])
            out = out & (top > least)[:, None]
            best = tl.where(out, top[:, None], best)
            where = tl.where(out, (start + at)[:, None], where)
    at_out = ((sample * tl.num_programs(2) + split) * num_sources + rows[:, None]) * TOPK + slots[None, :]
    keep = rows_ok[:, None] & (slots < TOPK)[None, :]
    tl.store(values + at_out, best, mask=keep)
    tl.store(index + at_out, where, mask=keep)


def match_triton(
    source: Tensor, target: Tensor, target_mask: Tensor | None, topk: int, *, skip_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Values times |source| (float32) and indices (int64, -1 for none) of the best targets of every source.

    With `skip_self`, source and target are the same tokens, a token is no target of its own, and the values are the
    cosines themselves, scaled by one product of both norms: s_ij and s_ji are equal, so that mutual neighbours tie.
    """
    batch, num_sources, width = source.shape
    num_targets = target.shape[1]
    blocks = tile_blocks(source)
    row_blocks = cdiv(num_sources, blocks["BLOCK_X"])
    splits, per_split = split_columns(row_blocks * batch, num_targets, blocks["BLOCK_Y"])
    shape = (batch, splits, num_sources, topk)
    values = torch.empty(shape, dtype=torch.float32, device=source.device)
    index = torch.empty(shape, dtype=torch.int32, device=source.device)
    if values.numel():
        mask = None if target_mask is None else target_mask.view(torch.uint8)
        _match_kernel[(row_blocks, batch, splits)](
            source,
            target,
            inverse_norm_triton(target),
            source if mask is None else mask,
            values,
            index,
            num_sources,
            num_targets,
            width,
            per_split,
            *source.stride(),
            *target.stride(),
            *((0, 0) if mask is None else mask.stride()),
            HAS_MASK=mask is not None,
            SKIP_SELF=skip_self,
            TOPK=topk,
            SLOTS=next_power_of_two(topk),
            **blocks,
        )
    values = values.transpose(1, 2).flatten(2)
    index = index.transpose(1, 2).flatten(2).long()
    if topk > 1:  # slots are unordered: by index first, then by value
        order = index.argsort(dim=-1, stable=True)
        values, index = values.gather(-1, order), index.gather(-1, order)
    values, order = top_first(values, topk)
    return values, index.gather(-1, order)


def _triton(
    source: Tensor, target: Tensor, source_mask: Tensor | None, target_mask: Tensor | None, topk: int
) -> tuple[Tensor, Tensor]:
    if target.shape[1] == 0 or target.shape[2] == 0:
        return _torch(source, target, source_mask, target_mask, topk)
    values, index = match_triton(source, target, target_mask, topk)
    inverse = inverse_norm_triton(source)[..., None]
    return _close(torch.where(index < 0, values, values * inverse), index, source_mask)


def _fake(source: Tensor, target: Tensor, source_mask: Any, target_mask: Any, topk: int, impl: str | None) -> Any:
    shape = (*source.shape[:2], topk)
    return source.new_empty(shape, dtype=accumulator(source)), source.new_empty(shape, dtype=torch.int64)


def _flops(source: Any, target: Any, source_mask: Any, target_mask: Any, topk: int, impl: str | None) -> int:
    return cost(source[0], source[1], target[1], source[2]).flops


@register("cosine_match", fake=_fake, flops=_flops)
def _operator(
    source: Tensor,
    target: Tensor,
    source_mask: Tensor | None,
    target_mask: Tensor | None,
    topk: int,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    is_triton = choose_path(source, impl).name == "triton" and topk <= MOST_IN_REGISTERS
    run = _triton if is_triton else _torch
    return run(source, target, source_mask, target_mask, topk)
