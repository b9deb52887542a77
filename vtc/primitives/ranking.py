"""Ranks and thresholds: what methods whose count depends on the content are composed of."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from vtc.stages import Links, drop
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


def ranks(score: Shaped[Tensor, "B N"], mask: Bool[Tensor, "B N"] | None = None) -> Int[Tensor, "B N"]:
    """Place of each token in descending order of `score`, counted from 0; ties to the lowest index, masked ones last.

    Example:
        >>> ranks(torch.tensor([[0.1, 0.9, 0.5, 0.9]])).tolist()
        [[3, 0, 2, 1]]
    """
    order = score.sort(dim=1, descending=True, stable=True).indices
    if mask is not None:
        order = order.gather(1, (~mask).gather(1, order).long().sort(dim=1, stable=True).indices)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, place)


def ranks_within(
    score: Float[Tensor, "B N"], part: Int[Tensor, "B N"], parts: int, mask: Bool[Tensor, "B N"]
) -> Int[Tensor, "B N"]:
    """Place of each token among the tokens of its own part (a tile, a frame), by descending `score`.

    Example:
        >>> part = torch.tensor([[0, 0, 1, 1]])
        >>> ranks_within(torch.tensor([[0.1, 0.9, 0.7, 0.5]]), part, 2, part >= 0).tolist()
        [[1, 0, 0, 1]]
    """
    part = part.masked_fill(~mask, parts)
    overall = ranks(-(part * score.shape[1] + ranks(score, mask)))
    counts = part.new_zeros(part.shape[0], parts + 1).scatter_add(1, part, torch.ones_like(part))
    return overall - (counts.cumsum(1) - counts).gather(1, part)


def at_most(score: Float[Tensor, "B N"], candidates: Bool[Tensor, "B N"], budget: Sequence[int]) -> Bool[Tensor, "B N"]:
    """The candidates, and where there are more than `budget[b]` of them those with the highest score."""
    most = torch.tensor(list(budget), device=score.device)[:, None]
    return candidates & (ranks(score.float(), candidates) < most)


def keep_where(kept: Bool[Tensor, "B N"], width: int) -> Int[Tensor, "B K"]:
    """The first `width` True places of each group as an index set.

    Example:
        >>> keep_where(torch.tensor([[False, True, True], [True, False, False]]), 2).tolist()
        [[1, 2], [0, -1]]
    """
    order = (~kept).long().sort(dim=1, stable=True).indices[:, :width]
    return order.masked_fill(~kept.gather(1, order), -1)


def slot_of(keep: Int[Tensor, "B K"], width: int) -> Int[Tensor, "B N"]:
    """For each of `width` tokens its slot in `keep`, -1 where it does not stay.

    Example:
        >>> slot_of(torch.tensor([[1, 3, -1]]), 4).tolist()
        [[-1, 0, -1, 1]]
    """
    slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    place = torch.where(keep < 0, width, keep)  # padding lands in an extra column
    return torch.full((keep.shape[0], width + 1), -1, device=keep.device).scatter(1, place, slots)[:, :width]


def settle(tokens: Tokens, keep: Int[Tensor, "B K"]) -> tuple[Tokens, Int[Tensor, "B J"]]:
    """The tokens with the budget that `keep` really meets, and `keep` without surplus padding.

    The lengths of a map are host integers, so a method whose count depends on the content waits here, once.
    """
    counts = tuple((keep >= 0).sum(dim=1).tolist())
    return replace(tokens, budget=counts), keep[:, : max(counts)]


def settled(compress: Callable[[Tokens, Tensor, Links | None], TokenMap] = drop) -> Callable[..., TokenMap]:
    """The compress rule `compress` for a filter that may return fewer tokens than the budget."""

    def rule(tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        return compress(*settle(tokens, keep), links)

    return rule


def quantile(score: Float[Tensor, "B N"], q: float, mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B 1"]:
    """The `q` quantile of the valid scores of each group, by linear interpolation (NumPy's default).

    Example:
        >>> score = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
        >>> quantile(score, 0.5, score < 9).tolist()
        [[2.0]]
    """
    ordered = score.float().masked_fill(~mask, torch.inf).sort(dim=1).values
    place = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0).double() * q
    low, high = (ordered.gather(1, side.long()) for side in (place.floor(), place.ceil()))
    return torch.lerp(low, high, (place - place.floor()).to(low.dtype))


def seeded_uniform(tokens: Tokens, seed: int) -> Float[Tensor, "B N"]:
    """Uniform numbers in [0, 1) from a local generator; equal for groups of equal length, 0 in padding."""
    drawn = {}
    for n in set(tokens.lengths):
        generator = torch.Generator().manual_seed(seed)
        drawn[n] = pad(torch.rand(n, generator=generator), (0, max(tokens.lengths) - n))
    return torch.stack([drawn[n] for n in tokens.lengths]).to(tokens.x.device)
