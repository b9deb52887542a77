"""The matrix f(s_ij) of cosine similarities as an operator, and what a CPU keeps of it between two uses.

A propagation applies the same matrix several times. Recomputing it costs N^2 D multiply-adds per step, keeping it in
full 4 N^2 bytes. On the CPU the tiles of the first use are kept in their smallest form while `kept_bytes` lasts: the
edges alone (8 bytes each), or all entries rounded to 16 significant bits (3 bytes each, relative error 2^-16; products
and sums stay in float32). A graph that fits as it is, is kept unrounded. Only tiles on and above the diagonal exist.
What does not fit is recomputed at every use.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vtc.kernels._cosine import Place, cosine_tile, symmetric_places

IDENTITY, INDICATOR, EXPONENTIAL = 0, 1, 2
LOG2_E = 1.4426950408889634
NO_EDGE = -1e30  # as a similarity: its exponential is 0 at every temperature, and no slow path of exp2 is met
KEPT_PER_INPUT = 2  # times N D float32: memory stays O(N D)
KEPT_PER_PAIR = 1.5  # bytes; with the workspace below a tenth of the 4.3 float32 matrices of the plain definition
KEPT_AT_LEAST = 4 << 20  # bytes: a small graph is kept completely


class Edges(NamedTuple):
    """The non-zero entries of a tile: places in the flattened tile (int32), and values."""

    place: Tensor
    value: Tensor

    def restore(self, shape: tuple[int, ...]) -> Tensor:
        tile = self.value.new_zeros(shape)
        tile.view(-1).index_add_(0, self.place, self.value)
        return tile


class Whole(NamedTuple):
    """The tile itself."""

    value: Tensor

    def restore(self, shape: tuple[int, ...]) -> Tensor:
        return self.value.view(shape)


class Rounded(NamedTuple):
    """The upper 24 bits of float32 entries, as 16 (with the sign) and 8."""

    high: Tensor
    low: Tensor

    def restore(self, shape: tuple[int, ...]) -> Tensor:
        bits = self.high.to(torch.int32).mul_(256).add_(self.low).mul_(256)
        return bits.view(torch.float32).view(shape)


class Graph:
    """F = f(s_ij) of the tokens x [B, N, D]; f is the identity, the indicator s >= threshold, or exp((s - 1) / t).

    Entries below the threshold are 0. `keep` allows to keep tiles for the next `apply`; it has an effect on float32
    accumulation on the CPU only (elsewhere counting edges would wait for the device).
    """

    def __init__(
        self,
        x: Tensor,
        inverse: Tensor,
        kind: int,
        threshold: float | None,
        temperature: float,
        *,
        include_self: bool = True,
        keep: bool = False,
    ) -> None:
        self.x, self.inverse, self.kind, self.temperature = x, inverse, kind, temperature
        self.threshold, self.include_self = threshold, include_self
        self._kept: dict[int, Edges | Whole | Rounded] = {}
        can_keep = keep and x.device.type == "cpu" and inverse.dtype == torch.float32
        self._left = kept_bytes(*x.shape) if can_keep else 0
        self._fits = 4 * x.shape[0] * x.shape[1] ** 2 <= self._left

    def apply(self, weight: Tensor) -> Tensor:
        """sum_j F_ij weight_j for all i, [B, N]."""
        result = torch.zeros_like(self.inverse)
        for number, place in enumerate(symmetric_places(self.x)):
            tile = self._tile(number, place)
            if tile is None:
                continue
            samples, rows, columns = place
            result[samples, rows] += torch.bmm(tile, weight[samples, columns, None])[..., 0]
            if rows.start != columns.start:
                result[samples, columns] += torch.bmm(weight[samples, None, rows], tile)[:, 0]
            if self._left and number not in self._kept:
                self._keep(number, tile)
            del tile  # its memory is free for the next one
        return result

    def _tile(self, number: int, place: Place) -> Tensor | None:
        """The tile, kept or computed; None when it is known to hold no edge."""
        if number in self._kept:
            kept = self._kept[number]
            if isinstance(kept, Edges) and not kept.place.numel():
                return None
            return kept.restore(tuple(len(range(*part.indices(part.stop))) for part in place))
        tile = cosine_tile(self.x, self.inverse, place)
        samples, rows, columns = place
        is_diagonal = rows.start == columns.start
        if is_diagonal:
            tile.diagonal(dim1=1, dim2=2).copy_(self.inverse[samples, rows] > 0)
        edge_weight(tile, self.kind, self.threshold, self.temperature)
        if is_diagonal and not self.include_self:
            tile.diagonal(dim1=1, dim2=2).zero_()
        return tile

    def _keep(self, number: int, tile: Tensor) -> None:
        """Keeps the tile if there is room; it is not to be used afterwards."""
        flat = tile.view(-1)
        is_edge = flat.bool()
        num_edges = int(is_edge.sum())
        per_entry = 4 if self._fits else 3
        cost = min(8 * num_edges, per_entry * flat.numel())
        if cost > self._left:
            return
        self._left -= cost
        if cost == 8 * num_edges:
            at = is_edge.nonzero()[:, 0]
            self._kept[number] = Edges(at.to(torch.int32), flat[at])
        elif self._fits:
            self._kept[number] = Whole(flat)
        else:
            bits = flat.view(torch.int32).add_(128)  # to nearest: 128 is half of the last kept bit
            low = bits.bitwise_right_shift_(8).to(torch.uint8)
            self._kept[number] = Rounded(bits.bitwise_right_shift_(8).to(torch.int16), low)


def kept_bytes(batch: int, num_tokens: int, width: int) -> int:
    """How much of the graph a CPU keeps."""
    pairs = max(KEPT_AT_LEAST, int(KEPT_PER_PAIR * batch * num_tokens**2))
    return min(KEPT_PER_INPUT * 4 * batch * num_tokens * width, pairs)


def edge_weight(tile: Tensor, kind: int, threshold: float | None, temperature: float) -> Tensor:
    """f of a tile of similarities, in place; the indicator needs a threshold."""
    if threshold is not None:
        if kind == INDICATOR:
            return tile.ge_(threshold)
        # `threshold_` keeps what is larger, an edge may be equal
        bound = torch.tensor([threshold, float("-inf")], dtype=tile.dtype)
        below = torch.nextafter(bound[0], bound[1]).item()
        torch.threshold_(tile, below, 0.0 if kind == IDENTITY else NO_EDGE)
    if kind == EXPONENTIAL:
        tile.sub_(1.0).mul_(LOG2_E / temperature).exp2_()
    return tile
