"""Which tokens stay: rankings and index sets. Index sets are int64 [B, K], ascending, with -1 as padding at the end."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.indices import take


def topk_keep(
    score: Float[Tensor, "B N"],
    budget: Sequence[int],
    *,
    mask: Bool[Tensor, "B N"] | None = None,
    protect: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """The `budget[b]` tokens of group b with the highest score, in raster order; ties go to the lowest index.

    Args:
        mask: False where there is no token.
        protect: True for tokens that stay before any other.

    Example:
        >>> topk_keep(torch.tensor([[0.1, 0.9, 0.5, 0.9]]), [2]).tolist()
        [[1, 3]]
    """
    score = score.float()
    if protect is not None:
        score = score.masked_fill(protect, torch.inf)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    width = min(max(budget), score.shape[1])
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :width]
    return ascending(order.masked_fill(~valid_prefix(budget, width, score.device), -1))


def ascending(picks: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
    """Picks in any order -> raster order, padding last.

    Example:
        >>> ascending(torch.tensor([[5, -1, 2]])).tolist()
        [[2, 5, -1]]
    """
    last = torch.iinfo(picks.dtype).max
    ordered = picks.masked_fill(picks < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def valid_prefix(lengths: Sequence[int], width: int, device: torch.device | None = None) -> Bool[Tensor, "B W"]:
    """True at the first `lengths[b]` of `width` places."""
    ends = torch.tensor(list(lengths), device=device)
    return torch.arange(width, device=device) < ends[:, None]


def rest_of(keep: Int[Tensor, "B K"], lengths: Sequence[int], kept: Sequence[int], width: int) -> Int[Tensor, "B R"]:
    """The tokens that are not in `keep`, in raster order: the first `lengths[b]` of `width` without `kept[b]`."""
    rest = [n - k for n, k in zip(lengths, kept, strict=True)]
    inside = torch.zeros(keep.shape[0], width + 1, dtype=torch.bool, device=keep.device)
    inside = inside.scatter(1, torch.where(keep < 0, width, keep), True)[:, :-1]
    free = valid_prefix(lengths, width, keep.device) & ~inside
    order = (~free).long().sort(dim=1, stable=True).indices[:, : max(rest)]
    return order.masked_fill(~valid_prefix(rest, order.shape[1], keep.device), -1)


def take_rows(x: Float[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """The rows `index` of each group; -1 reads row 0, for the caller to mask."""
    return take(x, index)


def join_keep(first: Int[Tensor, "B K"], second: Int[Tensor, "B J"]) -> Int[Tensor, "B L"]:
    """Both index sets one after the other, with the padding moved to the end."""
    both = torch.cat([first, second], dim=1)
    order = (both < 0).long().sort(dim=1, stable=True).indices
    return both.gather(1, order)
