"""Tiles of one image as groups: values of the full image, sums over an image, and budgets shared by its tiles."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.primitives.ranking import ranks_within


def of_full(value: Tensor, image: Int[Tensor, " B"], is_full: Bool[Tensor, " B"]) -> Tensor:
    """For each tile the row of `value` [B, ...] that belongs to the full image of its image.

    Example:
        >>> image, first = torch.tensor([0, 0, 1]), torch.tensor([True, False, True])
        >>> of_full(torch.tensor([5, 6, 7]), image, first).tolist()
        [5, 5, 7]
    """
    index = torch.arange(len(image), device=image.device)
    table = torch.zeros(len(image) + 1, dtype=torch.long, device=image.device)
    return value[table.scatter(0, torch.where(is_full, image, len(image)), index)[image]]


def per_image(value: Sequence[int] | Tensor, image: Int[Tensor, " B"]) -> Tensor:
    """For each tile the sum of `value` [B] over the tiles of its image.

    Example:
        >>> per_image([5, 6, 7], torch.tensor([0, 0, 1])).tolist()
        [11, 11, 7]
    """
    values = torch.as_tensor(value, device=image.device)
    return torch.zeros_like(values).scatter_add(0, image, values)[image]


def seats(
    share: Float[Tensor, " B"],
    place: Int[Tensor, "B N"],
    total: Int[Tensor, " B"],
    image: Int[Tensor, " B"],
    *,
    full: Bool[Tensor, " B"],
    own: Int[Tensor, " B"],
    mask: Bool[Tensor, "B N"],
) -> Bool[Tensor, "B N"]:
    """Which tokens stay when the tiles of an image share exactly `total` seats by highest averages (Sainte-Lague).

    The j-th best token of a tile (`place`, counted from 0) takes its seat at share / (j + 1/2). The full image (`full`)
    has its `own` best tokens seated first, and more of them only when all tiles are full; a tile without a share comes
    after all others.
    """
    turn = (share.float()[:, None] + 1e-6) / (place + 0.5)
    turn = torch.where(full[:, None], -1.0 - place, turn)
    turn = turn.masked_fill(full[:, None] & (place < own[:, None]), torch.inf)
    group = image[:, None].expand_as(place)
    order = ranks_within(turn.reshape(1, -1), group.reshape(1, -1), len(image), mask.reshape(1, -1)).view_as(place)
    return mask & (order < total[:, None])
