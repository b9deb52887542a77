"""Greedy diversity: farthest point, max-min and max-sum selection on cosine distance 1 - cos, in pick order.

    next = argmax over available i of  weight_i * g_i(S) + bonus_i
    max_min:  g_i(S) = min over j in S of (1 - s_ij)         farthest_point: max_min without weight and bonus
    max_sum:  g_i(S) = sum over j in S of (1 - s_ij)

S is what was picked plus `initial` (never returned, never picked). While S is empty, S is read as all other valid
tokens: max_min then starts with the token whose nearest neighbour is farthest (DivPrune's seed), max_sum with the one
farthest from all; `start` replaces that first pick (ToDRE's pivot). A token without any neighbour is at distance 2.
Ties go to the lowest index, no token is picked twice, and slots beyond the number of available tokens hold -1.
The K steps recompute one row of similarities each (O(K N D)); no N x N matrix is stored unless it is smaller than
twice the input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vtc.kernels._cosine import cosine_tiles, cosine_to, inverse_norm, normalise, symmetric_tiles
from vtc.kernels._dispatch import Cost, choose_path, lazy_jit, next_power_of_two, register, tl
from vtc.kernels._greedy import (
    STEP_BLOCK,
    best_of_blocks,
    cosines_with,
    first_blocks,
    fits_one_launch,
    gram_triton,
    last_pick,
)
from vtc.kernels._tiles import inverse_norm_triton
from vtc.kernels.cosine_match import match_triton
from vtc.kernels.similarity_degree import linear_similarity, linear_triton


def farthest_point(
    x: Float[Tensor, "B N D"],
    k: int,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    start: Int64[Tensor, "B"] | None = None,
    impl: str | None = None,
) -> Int64[Tensor, "B K"]:
    """Indices of `k` tokens, each the farthest from those before it (k-center); DivPrune and ToDRE's first version.

    `start` fixes the first pick; one that is not a valid token counts as the lowest valid index.

    >>> farthest_point(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]), 2, start=torch.tensor([0])).tolist()
    [[0, 2]]
    """
    return max_min(x, k, mask=mask, start=start, impl=impl)


def max_min(
    x: Float[Tensor, "B N D"],
    k: int,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    start: Int64[Tensor, "B"] | None = None,
    initial: Bool[Tensor, "B N"] | None = None,
    weight: Float[Tensor, "B N"] | None = None,
    bonus: Float[Tensor, "B N"] | None = None,
    impl: str | None = None,
) -> Int64[Tensor, "B K"]:
    """Greedy max-min dispersion with a score: a factor (`weight`) and a term (`bonus`) per token.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    >>> max_min(x, 1, initial=torch.tensor([[True, False, False]])).tolist()
    [[2]]
    """
    return _select(x, Selection(k, mask, start, initial, weight, bonus, is_sum=False), impl)


def max_sum(
    x: Float[Tensor, "B N D"],
    k: int,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    start: Int64[Tensor, "B"] | None = None,
    initial: Bool[Tensor, "B N"] | None = None,
    weight: Float[Tensor, "B N"] | None = None,
    bonus: Float[Tensor, "B N"] | None = None,
    impl: str | None = None,
) -> Int64[Tensor, "B K"]:
    """Greedy max-sum dispersion: each pick has the smallest summed similarity to those before it (ToDRE).

    >>> max_sum(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]), 2, start=torch.tensor([1])).tolist()
    [[1, 0]]
    """
    return _select(x, Selection(k, mask, start, initial, weight, bonus, is_sum=True), impl)


class Selection(NamedTuple):
    """What is asked of the tokens: the arguments above, and whether distances to S are summed (or the least counts)."""

    k: int
    mask: Tensor | None
    start: Tensor | None
    initial: Tensor | None
    weight: Tensor | None
    bonus: Tensor | None
    is_sum: bool

    def valid(self, x: Tensor) -> Tensor:
        """Which tokens take part, bool [B, N]."""
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.mask is None else self.mask

    def available(self, valid: Tensor) -> Tensor:
        """Which tokens may be picked, bool [B, N]."""
        return valid if self.initial is None else valid & ~self.initial

    def selected(self, valid: Tensor) -> Tensor:
        """S before the first pick, bool [B, N]."""
        return torch.zeros_like(valid) if self.initial is None else self.initial & valid

    def objective(self, distance: Tensor) -> Tensor:
        """What the next pick is the largest of, [B, N]."""
        if self.weight is not None:
            distance = distance * self.weight
        return distance if self.bonus is None else distance + self.bonus

    def joined(self, distance: Tensor, row: Tensor) -> Tensor:
        """Distance to S once the token at the distances `row` is in it."""
        return distance + row if self.is_sum else torch.minimum(distance, row)


def _select(x: Tensor, wanted: Selection, impl: str | None) -> Tensor:
    if wanted.k < 0:
        raise ValueError(f"k={wanted.k} for a diverse selection: it must be 0 or more.")
    if wanted.start is not None and wanted.initial is not None:
        raise ValueError("start and initial both say where a diverse selection begins: give one of them.")
    if impl == "reference":
        return reference(x, wanted)
    picks: Tensor = _operator(x, *wanted, impl)
    return picks


def cost(batch: int, num_tokens: int, width: int, k: int, *, is_seeded: bool, is_sum: bool, itemsize: int = 4) -> Cost:
    """FLOPs of the seed (all pairs for max-min, a closed form for max-sum) and of K rows; bytes of K + 1 readings."""
    seed = 0 if is_seeded else (2 * num_tokens if is_sum else num_tokens * num_tokens)
    flops = 2 * batch * width * (seed + (k + 1) * num_tokens)
    return Cost(flops, batch * num_tokens * width * itemsize * (k + 1))


def reference(x: Tensor, wanted: Selection) -> Tensor:
    """The definition, with the whole similarity matrix."""
    unit = normalise(x)
    similarity = unit @ unit.transpose(1, 2)
    valid = wanted.valid(x)
    selected = wanted.selected(valid)
    others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    available = valid & ~selected
    picks = torch.full((x.shape[0], wanted.k), -1, dtype=torch.int64, device=x.device)
    for step in range(min(wanted.k, x.shape[1])):
        seen = torch.where(selected.any(dim=-1, keepdim=True), selected, valid)
        seen = seen[:, None] & others
        if wanted.is_sum:
            distance = torch.where(seen, 1 - similarity, 0.0).sum(dim=-1)
        else:
            distance = 1 - similarity.masked_fill(~seen, -1.0).amax(dim=-1)
        objective = wanted.objective(distance)
        if step == 0 and wanted.start is not None:
            objective = torch.nn.functional.one_hot(wanted.start, x.shape[1]).to(unit.dtype)
        best, pick = objective.masked_fill(~available, float("-inf")).max(dim=-1)
        found = best > float("-inf")
        picks[:, step] = torch.where(found, pick, -1)
        now = torch.zeros_like(valid).scatter(1, pick[:, None], found[:, None])
        selected, available = selected | now, available & ~now
    return picks


def _torch(x: Tensor, wanted: Selection) -> Tensor:
    batch, num_tokens = x.shape[:2]
    picks = torch.full((batch, wanted.k), -1, dtype=torch.int64, device=x.device)
    steps = min(wanted.k, num_tokens)
    if steps == 0 or batch == 0:
        return picks
    inverse = inverse_norm(x)
    valid = wanted.valid(x)
    available = wanted.available(valid).clone()
    distance, is_open, objective = _seed(x, inverse, valid, wanted, linear_similarity, _nearest)
    for step in range(steps):
        best, pick = objective.masked_fill(~available, float("-inf")).max(dim=-1)
        picks[:, step] = torch.where(best > float("-inf"), pick, -1)
        available.scatter_(1, pick[:, None], False)
        if step + 1 == steps:
            break
        row = 1 - cosine_to(x, inverse, pick)
        joined = wanted.joined(distance, row)
        distance = torch.where(is_open, row, joined) if step == 0 else joined
        objective = wanted.objective(distance)
    return picks


def _seed(
    x: Tensor,
    inverse: Tensor,
    valid: Tensor,
    wanted: Selection,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor],
    nearest: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance of every token to S before the first pick, whether S was empty, and what the first pick goes by.

    Where S was empty, the first row replaces the distances. `linear` sums the similarities to a weighted set of tokens,
    `nearest` is `_nearest`.
    """
    if wanted.start is not None:
        empty = torch.ones((x.shape[0], 1), dtype=torch.bool, device=x.device)
        is_start = torch.arange(x.shape[1], device=x.device) == wanted.start[:, None]
        return torch.zeros_like(inverse), empty, is_start.to(inverse.dtype)
    selected = wanted.selected(valid)
    is_open = ~selected.any(dim=-1, keepdim=True)
    seen = torch.where(is_open, valid, selected)
    if wanted.is_sum:
        distance = _summed_distance(linear(x, inverse, seen.to(inverse.dtype)), inverse, seen)
    else:
        distance = 1 - nearest(x, inverse, seen, wanted.initial is None)
    return distance, is_open, wanted.objective(distance)


def _summed_distance(similarity: Tensor, inverse: Tensor, seen: Tensor) -> Tensor:
    """Sum of 1 - s over the other tokens of `seen`, from the sum of s over all of them."""
    own = (seen & (inverse > 0)).to(inverse.dtype)
    return seen.sum(dim=-1, keepdim=True) - seen.to(inverse.dtype) - (similarity - own)


def _nearest(x: Tensor, inverse: Tensor, seen: Tensor, is_symmetric: bool) -> Tensor:
    """Largest similarity of every token with another token of `seen`, -1 without one."""
    nearest = torch.full_like(inverse, -1.0)
    tiles = symmetric_tiles(x, inverse) if is_symmetric else cosine_tiles(x, x, inverse, inverse)
    penalty = torch.where(seen, 0.0, float("-inf")).to(inverse.dtype)
    for samples, rows, columns, tile in tiles:
        if rows.start == columns.start:
            tile.diagonal(dim1=1, dim2=2).fill_(-1.0)
        elif is_symmetric:
            below = (tile + penalty[samples, rows, None]).amax(dim=1)
            nearest[samples, columns] = torch.maximum(nearest[samples, columns], below)
        right = tile.add_(penalty[samples, None, columns]).amax(dim=2)
        nearest[samples, rows] = torch.maximum(nearest[samples, rows], right)
        del tile  # its memory is free for the next one
    return nearest


@lazy_jit
@no_type_check
def _one_launch_kernel(
    gram,
    first,
    distance,
    is_open,
    available,
    weight,
    bonus,
    picks,
    num_tokens,
    k,
    steps,
    IS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All steps of one sample; state in registers, one row of the Gram matrix per step."""
    sample = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    ok = at < num_tokens
    offset = sample * num_tokens + at
    objective = tl.load(first + offset, mask=ok, other=float("-inf"))
    far = tl.load(distance + offset, mask=ok, other=0.0)
    free = tl.load(available + offset, mask=ok, other=0)
    open_set = tl.load(is_open + sample)
    factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    term = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + offset, mask=ok, other=0.0)
    if HAS_BONUS:
        term = tl.load(bonus + offset, mask=ok, other=0.0)
    for step in range(0, steps):
        best, pick = tl.max(objective, axis=0, return_indices=True)
        tl.store(picks + sample * k + step, tl.where(best > float("-inf"), pick, -1).to(tl.int64))
        free = tl.where(at == pick, 0, free)
        row = 1.0 - tl.load(gram + (sample * num_tokens + pick) * num_tokens + at, mask=ok, other=0.0)
        if IS_SUM:
            joined = far + row
        else:
            joined = tl.minimum(far, row)
        far = tl.where((step == 0) & (open_set != 0), row, joined)
        objective = tl.where(free != 0, far * factor + term, float("-inf"))


@lazy_jit
@no_type_check
def _step_kernel(
    x,
    inverse,
    distance,
    is_open,
    available,
    weight,
    bonus,
    picks,
    best_in,
    pick_in,
    best_out,
    pick_out,
    num_tokens,
    width,
    k,
    step,
    num_blocks,
    x_batch,
    x_row,
    x_step,
    IS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One step for a block of tokens: find the pick of the step, update the distances, leave the block's next best."""
    sample = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    blocks_at = sample * num_blocks
    best, pick = best_of_blocks(best_in + blocks_at, pick_in + blocks_at, num_blocks, BLOCKS)
    if block == 0:
        tl.store(picks + sample * k + step, tl.where(best > float("-inf"), pick, -1).to(tl.int64))
    rows = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = rows < num_tokens
    offset = sample * num_tokens + rows
    row = 1.0 - cosines_with(
        x + sample * x_batch, inverse + sample * num_tokens, pick, rows, ok, width, x_row, x_step, BLOCK, BLOCK_D
    )
    far = tl.load(distance + offset, mask=ok, other=0.0)
    if IS_SUM:
        joined = far + row
    else:
        joined = tl.minimum(far, row)
    far = tl.where((step == 0) & (tl.load(is_open + sample) != 0), row, joined)
    free = tl.where(rows == pick, 0, tl.load(available + offset, mask=ok, other=0))
    tl.store(distance + offset, far, mask=ok)
    tl.store(available + offset, free, mask=ok)
    if HAS_WEIGHT:
        far = far * tl.load(weight + offset, mask=ok, other=0.0)
    if HAS_BONUS:
        far = far + tl.load(bonus + offset, mask=ok, other=0.0)
    top, at = tl.max(tl.where(free != 0, far, float("-inf")), axis=0, return_indices=True)
    tl.store(best_out + blocks_at + block, top)
    tl.store(pick_out + blocks_at + block, block * BLOCK + at)


def _triton(x: Tensor, wanted: Selection) -> Tensor:
    batch, num_tokens, width = x.shape
    k, weight, bonus = wanted.k, wanted.weight, wanted.bonus
    steps = min(k, num_tokens)
    if steps == 0 or x.numel() == 0:
        return _torch(x, wanted)
    inverse = inverse_norm_triton(x)
    valid = wanted.valid(x)
    available = wanted.available(valid)
    distance, is_open, objective = _seed(x, inverse, valid, wanted, linear_triton, _nearest_triton)
    objective = objective.masked_fill(~available, float("-inf")).contiguous()
    picks = torch.full((batch, k), -1, dtype=torch.int64, device=x.device)
    free, opened = available.to(torch.int32), is_open.to(torch.int32)
    scores = (x if part is None else part.to(torch.float32).contiguous() for part in (weight, bonus))
    state = (distance, opened, free, *scores, picks)
    options = {"IS_SUM": wanted.is_sum, "HAS_WEIGHT": weight is not None, "HAS_BONUS": bonus is not None}
    if fits_one_launch(x):
        block = max(16, next_power_of_two(num_tokens))
        _one_launch_kernel[(batch,)](
            gram_triton(x, inverse),
            objective,
            *state,
            num_tokens,
            k,
            steps,
            **options,
            BLOCK=block,
            num_warps=min(32, max(4, block // 512)),
        )
        return picks
    best, pick = first_blocks(objective)
    next_best, next_pick = torch.empty_like(best), torch.empty_like(pick)
    num_blocks = best.shape[1]
    for step in range(steps - 1):
        _step_kernel[(num_blocks, batch)](
            x,
            inverse,
            *state,
            best,
            pick,
            next_best,
            next_pick,
            num_tokens,
            width,
            k,
            step,
            num_blocks,
            *x.stride(),
            **options,
            BLOCKS=next_power_of_two(num_blocks),
            BLOCK=STEP_BLOCK,
            BLOCK_D=min(256, max(16, next_power_of_two(width))),
        )
        best, pick, next_best, next_pick = next_best, next_pick, best, pick
    picks[:, steps - 1] = last_pick(best, pick)
    return picks


def _nearest_triton(x: Tensor, inverse: Tensor, seen: Tensor, is_symmetric: bool) -> Tensor:
    """`_nearest` with the fused kernel."""
    nearest, index = match_triton(x, x, seen, 1, skip_self=True)
    return torch.where(index < 0, -1.0, nearest)[..., 0]


def _fake(x: Tensor, k: int, *options: Any) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _flops(
    x: Any, k: int, mask: Any, start: Any, initial: Any, weight: Any, bonus: Any, is_sum: bool, impl: str | None
) -> int:
    return cost(x[0], x[1], x[2], k, is_seeded=start is not None, is_sum=is_sum).flops


@register("diverse_selection", fake=_fake, flops=_flops)
def _operator(
    x: Tensor,
    k: int,
    mask: Tensor | None,
    start: Tensor | None,
    initial: Tensor | None,
    weight: Tensor | None,
    bonus: Tensor | None,
    is_sum: bool,
    impl: str | None,
) -> Tensor:
    run = _triton if choose_path(x, impl).name == "triton" else _torch
    return run(x, Selection(k, mask, start, initial, weight, bonus, is_sum))
