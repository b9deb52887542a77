"""Index arithmetic, said once: -1 is padding.

Reading at -1 gives some entry that a mask hides (`take`) or -1 again (`follow`); writing at -1 goes nowhere (`put`,
`mark`, `invert`). Every function makes new tensors and waits for no device.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def follow(table: Int[Tensor, "B S"] | None, index: Int[Tensor, "B R"]) -> Int[Tensor, "B R"]:
    """`table[index]`, sample by sample; -1 stays -1.

    Args:
        table: int64; None is the identity.
        index: int64, entries of it.

    Example:
        >>> follow(torch.tensor([[5, 6, 7]]), torch.tensor([[2, -1, 0]])).tolist()
        [[7, -1, 5]]
    """
    if table is None:
        return index
    return table.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)


def take(x: Tensor, index: Int[Tensor, "B R"], dim: int = 1) -> Tensor:
    """Entries `index` of `x` along `dim`, sample by sample; -1 reads entry 0.

    Args:
        x: [B, ...] or [1, ...], which all samples share; any dtype.
        index: int64; may lie on another device.
        dim: which axis of `x` is read.

    Returns:
        `x` with R entries along `dim`, on its own device.
    """
    x = x.expand(index.shape[0], *x.shape[1:])
    place = [1] * x.dim()
    place[0], place[dim] = index.shape
    wanted = list(x.shape)
    wanted[dim] = index.shape[1]
    return x.gather(dim, index.clamp(min=0).to(x.device).view(place).expand(wanted))


def shift(index: Int[Tensor, "*axes"], by: int | Tensor) -> Int[Tensor, "*axes"]:
    """`index` counted from a place `by` entries before; -1 stays -1.

    Args:
        index: int64, any shape.
        by: a number, or a tensor that broadcasts to `index`.

    Example:
        >>> shift(torch.tensor([[2, -1, 0]]), 3).tolist()
        [[5, -1, 3]]
    """
    return torch.where(index < 0, -1, index + by)


def take_positions(positions: Int[Tensor, "*axes #B S"], index: Int[Tensor, "B R"]) -> Int[Tensor, "*axes B R"]:
    """Position ids of the entries `index`; M-RoPE has one row of them for each axis. -1 reads entry 0."""
    index = index.clamp(min=0).to(positions.device)
    axes = positions.shape[:-2]
    return positions.expand(*axes, index.shape[0], -1).gather(-1, index.expand(*axes, -1, -1))


def put(x: Tensor, index: Int[Tensor, "B R"], values: Tensor) -> Tensor:
    """`x` [B, L, D] with its rows `index` replaced by `values` [B, R, D]."""
    target = torch.where(index < 0, x.shape[1], index).to(x.device)  # padding lands in an extra row
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1)
    return padded.scatter(1, target[..., None].expand(-1, -1, x.shape[2]), values)[:, :-1]


def mark(index: Int[Tensor, "B R"], length: int) -> Bool[Tensor, "B S"]:
    """True at the entries `index` of `length`.

    Example:
        >>> mark(torch.tensor([[2, -1, 0]]), 4).tolist()
        [[True, False, True, False]]
    """
    target = torch.where(index < 0, length, index)
    marks = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return marks.scatter(1, target, torch.ones_like(target, dtype=torch.bool))[:, :-1]


def compact(keep: Bool[Tensor, "B S"], counts: Sequence[int]) -> Int[Tensor, "B R"]:
    """The entries that `keep` marks, in order, padded on the left to the longest; `counts` are the sums of its rows.

    Example:
        >>> compact(torch.tensor([[True, False, True], [False, True, False]]), [2, 1]).tolist()
        [[0, 2], [-1, 1]]
    """
    batch, length = keep.shape
    rows = max(counts)
    pad = torch.tensor([rows - n for n in counts], device=keep.device)[:, None]
    target = torch.where(keep, keep.long().cumsum(1) - 1 + pad, rows)  # what is dropped lands in an extra place
    out = torch.full((batch, rows + 1), -1, device=keep.device)
    source = torch.arange(length, device=keep.device).expand(batch, -1)
    return out.scatter(1, target, source)[:, :rows]


def invert(index: Int[Tensor, "B R"], length: int) -> Int[Tensor, "B S"]:
    """For each of `length` entries where it stands in `index`, -1 where it does not.

    Example:
        >>> invert(torch.tensor([[-1, 2, 0]]), 4).tolist()
        [[2, -1, 1, -1]]
    """
    batch, rows = index.shape
    out = torch.full((batch, length + 1), -1, device=index.device)
    target = torch.where(index < 0, length, index)
    return out.scatter(1, target, torch.arange(rows, device=index.device).expand(batch, -1))[:, :length]
