"""Tokens that differ from each other: de-duplication in rounds, suppression, and density peaks."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vtc.kernels import cosine_match
from vtc.primitives.ranking import ranks
from vtc.primitives.selection import join_keep, take_rows, valid_prefix


def distinct_of(
    x: Float[Tensor, "B N D"],
    order: Int[Tensor, "B R"],
    have: Sequence[int],
    want: Sequence[int],
    *,
    per_round: int = 8,
) -> Int[Tensor, "B W"]:
    """What is left of `order` after its duplicates were removed in rounds, in no particular order.

    Each round splits the list into even and odd places and removes the even ones that are most similar to any odd
    one, at most `per_round`. The survivors, most similar first, and then the odd ones are the next round's list, so
    the split is drawn anew.

    Args:
        order: tokens to choose from, padding -1 last; the first `have[b]` of group b are valid.
        want: tokens that are left at the end.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.0]]])
        >>> distinct_of(x, torch.tensor([[0, 1, 2, 3]]), [4], [3]).tolist()
        [[2, 1, 3]]
    """
    have = [h if w else 0 for h, w in zip(have, want, strict=True)]
    order = order.masked_fill(~valid_prefix(have, order.shape[1], order.device), -1)
    while any(h > w for h, w in zip(have, want, strict=True)):
        drop = [min(per_round, h - w, h // 2) for h, w in zip(have, want, strict=True)]
        even, odd = order[:, ::2], order[:, 1::2]
        value, _ = cosine_match(take_rows(x, even), take_rows(x, odd), source_mask=even >= 0, target_mask=odd >= 0)
        value = value[..., 0].masked_fill(even < 0, -torch.inf)
        even = even.gather(1, value.sort(dim=1, descending=True, stable=True).indices)
        even = even.masked_fill(valid_prefix(drop, even.shape[1], even.device), -1)
        have = [h - d for h, d in zip(have, drop, strict=True)]
        order = join_keep(even, odd)[:, : max(have)]
    return order[:, : max(want)]


def unlike_picks(
    x: Float[Tensor, "B N D"],
    score: Float[Tensor, "B N"],
    k: int,
    threshold: float,
    *,
    mask: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Picks by descending score that skip tokens whose cosine similarity to an earlier pick exceeds `threshold`.

    When only skipped tokens are left, they follow by descending score, so that there are always `k` picks (-1 beyond
    the number of tokens). Ties go to the lowest index. Non-maximum suppression with a fixed count.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> unlike_picks(x, torch.tensor([[3.0, 2.0, 1.0]]), 3, 0.9).tolist()
        [[0, 2, 1]]
    """
    unit = normalize(x.float(), dim=-1)
    is_free = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    is_active = is_free
    picks = []
    for _ in range(min(k, x.shape[1])):
        candidates = torch.where(is_active.any(dim=1, keepdim=True), is_active, is_free)
        best, pick = score.float().masked_fill(~candidates, -torch.inf).max(dim=1)
        picks.append(pick.masked_fill(best == -torch.inf, -1))
        similarity = torch.bmm(unit, take_rows(unit, pick[:, None]).transpose(1, 2))[..., 0]
        is_free = is_free.scatter(1, pick[:, None], False)
        is_active = is_active & is_free & (similarity <= threshold)
    return torch.stack(picks, dim=1)


def density_centers(
    metric: Float[Tensor, "B N d"],
    mask: Bool[Tensor, "B N"],
    *,
    cutoff: float,
    budget: Sequence[int],
    spread: float = 2.0,
) -> Bool[Tensor, "B N"]:
    """Greedy cluster centres that are more than `cutoff` apart in cosine distance, the densest token first.

    A scan by descending density sum_j exp(-(d_ij / spread)^2) makes a token a centre if no centre lies within
    `cutoff` of it, until there are `budget[b]` of them. The cosine distances of a group are stored, [B, N, N].
    """
    unit = normalize(metric.float(), dim=-1)
    distance = (1 - unit @ unit.transpose(1, 2)).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    density = ((-((distance / spread) ** 2)).exp() * mask[:, None]).sum(dim=-1)
    place = ranks(density, mask)
    most = torch.tensor(list(budget), device=metric.device)[:, None]
    centers, free = torch.zeros_like(mask), mask
    index = torch.arange(mask.shape[1], device=mask.device)
    for step in range(min(max(budget), mask.shape[1])):
        first = torch.where(free, place, mask.shape[1]).argmin(dim=1, keepdim=True)
        opens = free.gather(1, first) & (step < most)
        near = distance.gather(1, first[..., None].expand(-1, -1, mask.shape[1]))[:, 0] <= cutoff
        centers = centers | (opens & (index == first))
        free = free & ~(opens & near)
    return centers
