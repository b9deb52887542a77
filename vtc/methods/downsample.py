"""Downsample: give the tower a smaller image. The control that needs no method at all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import InputError
from vtc.stages import Links, Method, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class Downsample(Method):
    """The image is scaled down until the tower makes as many tokens as the budget allows.

    No paper: the baseline that costs nothing to build and saves work in the tower as well. The image that the processor
    made is scaled (bicubic, smoothed) to h x w tokens, position embeddings are interpolated by the host's own code, and
    the features stand at evenly spread places of the stock grid.

    A budget that is no product of the grid's shape is met by the nearest grid below it: the largest h x w <= budget of
    those whose height (or else width) is the whole part of what keeps the image's shape. 64 of 24 x 24 tokens are
    8 x 8; 32 are 5 x 6 = 30. Hosts with pixel shuffle take square grids only: 32 are 5 x 5 there. So the method is
    tagged adaptive: at most the budget stays.

    Only towers of fixed resolution whose tokens are one grid can do this. Hosts that cut an image into tiles, or size
    their grid by the image, do the same in their processor: hand that a smaller image.

    On the embedded model, which has seen one resolution only, it is far below `random`: 38 % of 128 answers right at
    64 tokens, where `random` has 73 % and all tokens 97 %. That is the tower on small images, not a loss on the way:
    the tests compare with the stock model on the scaled image.
    """

    slug = "downsample"
    steps = ("an even grid", "the tokens of the stock grid to their cell", "the tower's features of the smaller image")
    fidelity = "control"
    tags = frozenset({"adaptive", "merges", "needs_grid"})

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("square_grid"),)
        return (Stage(Site("pixels"), self.filter, self.correlate, self.compress, signals),)

    def filter(self, tokens: Tokens) -> Tensor:
        """The middle tokens of the cells of the smaller grid, in raster order."""
        shapes, grids = self._shapes(tokens)
        keep = []
        for (height, width), (rows, cols) in zip(shapes, grids, strict=True):
            row, col = _middles(height, rows), _middles(width, cols)
            keep.append((row[:, None] * width + col).flatten())
        padded = torch.nn.utils.rnn.pad_sequence(keep, batch_first=True, padding_value=-1)
        return padded.to(tokens.x.device)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        """Every token of the stock grid to the cell that it lies in, with an even share of it."""
        assert tokens.layout is not None
        shapes, grids = (torch.tensor(part, device=keep.device) for part in self._shapes(tokens))
        row, col = (
            place.clamp(min=0) * grids[:, axis, None] // shapes[:, axis, None]
            for axis, place in enumerate((tokens.layout.row, tokens.layout.col))
        )
        slot = (row * grids[:, 1:] + col).masked_fill(~tokens.mask, -1)
        counts = torch.zeros(keep.shape[0], keep.shape[1] + 1, device=keep.device)
        counts = counts.scatter_add(1, slot + 1, torch.ones_like(slot, dtype=counts.dtype))[:, 1:]
        weight = (1 / counts.clamp(min=1)).gather(1, slot.clamp(min=0)).masked_fill(slot < 0, 0.0)
        source = torch.arange(slot.shape[1], device=keep.device).expand_as(slot)
        return Links(source, slot, weight)

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        assert links is not None
        lengths = tuple(h * w for h, w in self._shapes(tokens)[1])
        return TokenMap(keep, lengths, tokens.x.shape[1], links.source, links.slot, links.weight)

    def _shapes(self, tokens: Tokens) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The stock grid and the smaller one of each group."""
        if tokens.layout is None:
            raise InputError("method 'downsample' makes a grid smaller, and these tokens have none.")
        shapes = [grids[0] for grids in tokens.layout.grids]
        # one value for all groups of a call, read from the host's side once
        square = tokens.signal("square_grid").tolist()
        grids = [
            smaller_grid(shape, budget, one) for shape, budget, one in zip(shapes, tokens.budget, square, strict=True)
        ]
        return shapes, grids


def smaller_grid(shape: tuple[int, int], budget: int, square: bool = False) -> tuple[int, int]:
    """(rows, columns) of the largest grid of the form of `shape` with at most `budget` cells.

    Example:
        >>> smaller_grid((24, 24), 64), smaller_grid((24, 24), 32), smaller_grid((24, 24), 32, square=True)
        ((8, 8), (5, 6), (5, 5))
    """
    height, width = shape
    if square:
        side = max(1, min(height, width, int(budget**0.5 + 1e-9)))
        return side, side
    rows = max(1, min(height, budget, int((budget * height / width) ** 0.5 + 1e-9)))
    cols = max(1, min(width, budget, int((budget * width / height) ** 0.5 + 1e-9)))
    by_rows, by_cols = (rows, max(1, min(width, budget // rows))), (max(1, min(height, budget // cols)), cols)
    return max(by_rows, by_cols, key=lambda grid: grid[0] * grid[1])


def _middles(length: int, cells: int) -> Tensor:
    """The token in the middle of each of `cells` even cells of a line."""
    return ((2 * torch.arange(cells) + 1) * length) // (2 * cells)
