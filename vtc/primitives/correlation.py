"""Correlate by attention: who is merged into whom, from rows of attention logits or probabilities."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.primitives.ranking import slot_of
from vtc.stages import Links


def targets_above(quantile: float, lengths: Sequence[int], *, strict: bool = False) -> list[int]:
    """How many of `lengths[b]` distinct values reach (strict: exceed) their `quantile`, at least 1.

    The quantile is interpolated linearly, so the count follows from the length alone.

    Example:
        >>> targets_above(0.998, [577, 145])
        [2, 1]
    """
    ends = [quantile * (n - 1) for n in lengths]
    below = [math.floor(end) + 1 if strict else math.ceil(end) for end in ends]
    return [max(1, n - b) for n, b in zip(lengths, below, strict=True)]


def top_links(
    weight: Float[Tensor, "B R N"],
    rest: Int[Tensor, "B R"],
    keep: Int[Tensor, "B K"],
    counts: Sequence[int],
    *,
    only_kept: bool = True,
) -> Links:
    """Each token of `rest` goes to the `counts[b]` tokens of largest weight; its weights are made to sum to 1.

    Args:
        weight: of every token for each of `rest`, not negative; 0 never receives anything.
        only_kept: whether only tokens that stay compete. Otherwise what falls on others is lost.
    """
    slot = slot_of(keep, weight.shape[2])
    if only_kept:
        weight = weight.masked_fill((slot < 0)[:, None], 0)
    width = min(max(counts), weight.shape[2])
    best = weight.float().sort(dim=2, descending=True, stable=True)
    value, target = best.values[..., :width], best.indices[..., :width]
    place = torch.arange(width, device=weight.device)
    value = value.masked_fill(place >= torch.tensor(list(counts), device=weight.device)[:, None, None], 0)
    value = value / value.sum(dim=2, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
    slot = slot[:, None].expand(-1, weight.shape[1], -1).gather(2, target)
    slot = slot.masked_fill((value <= 0) | (rest < 0)[..., None], -1)
    source = rest.clamp(min=0)[..., None].expand(-1, -1, width)
    return Links(source.flatten(1), slot.flatten(1), value.masked_fill(slot < 0, 0).flatten(1))
