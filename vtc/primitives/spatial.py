"""Even subsampling and pooling cells on the token grid, and the order of tokens that come from several crops."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.tokens import Tokens


def uniform_keep(tokens: Tokens) -> Int[Tensor, "B K"]:
    """The budget of tokens spread evenly over each group: rows of the grid, then places in the row."""
    return _padded([_cells(_shape(tokens, b), k)[0] for b, k in enumerate(tokens.budget)], tokens)


def grid_cells(tokens: Tokens) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B N"]]:
    """A partition of each group into as many cells as its budget: middle token of each cell, cell of each token."""
    cells = [_cells(_shape(tokens, b), k) for b, k in enumerate(tokens.budget)]
    return _padded([middle for middle, _ in cells], tokens), _padded([cell for _, cell in cells], tokens)


def canvas_order(keep: Int[Tensor, "C K"], crops: tuple[int, int], side: int) -> Int[Tensor, " J"]:
    """Flat indices into `keep` that read the patches of a grid of crops in raster order of the whole image.

    Args:
        keep: patch indices of each crop (crops row by row), -1 where there is none.
        crops: (height, width) in crops.
        side: patches along each edge of a crop.
    """
    crop = torch.arange(keep.shape[0], device=keep.device)[:, None]
    row = crop // crops[1] * side + keep // side
    column = crop % crops[1] * side + keep % side
    place = torch.where(keep < 0, crops[0] * crops[1] * side * side, row * crops[1] * side + column)
    return place.flatten().argsort(stable=True)[: int((keep >= 0).sum())]


def pool_units(x: Float[Tensor, "... N"], unit: int) -> Float[Tensor, "... M"]:
    """Mean over runs of `unit` consecutive values: what a merger that joins consecutive patches does to a score."""
    return x.unflatten(-1, (-1, unit)).mean(-1)


def segment_table(tokens: Tokens, *, join_crops: bool = False) -> Int[Tensor, "G W"]:
    """The tokens of each segment (tile, frame) of each group, in their order, padding -1 last; G = groups x segments.

    Separators belong to no segment. Without a layout each group is one segment.

    Args:
        join_crops: all segments behind the first one, the thumbnail of AnyRes, count as one.
    """
    batch, width = tokens.x.shape[:2]
    if tokens.layout is None:
        index = torch.arange(width, device=tokens.x.device).expand(batch, -1)
        return index.masked_fill(~tokens.mask, -1)
    sizes = [[h * w for h, w in grids] for grids in tokens.layout.grids]
    place = torch.where(tokens.mask & (tokens.layout.row >= 0), tokens.layout.segment, -1)
    if join_crops:
        sizes = [[row[0], sum(row[1:])] if len(row) > 1 else row for row in sizes]
        place = place.clamp(max=1)
    segments = max(len(row) for row in sizes)
    number = torch.arange(segments, device=place.device)[:, None]
    is_member = place[:, None] == number  # [B, S, N]
    # a segment never has more tokens than its grid, and grids are known to the host
    longest = min(width, max(size for row in sizes for size in row))
    order = (~is_member).long().sort(dim=2, stable=True).indices[..., :longest]
    return order.masked_fill(~is_member.gather(2, order), -1).flatten(0, 1)


def _shape(tokens: Tokens, group: int) -> tuple[int, int]:
    """(height, width) of a group that is one full raster grid, else one row of tokens."""
    length = tokens.lengths[group]
    if tokens.layout is not None:
        grids = tokens.layout.grids[group]
        if sum(h * w for h, w in grids) == length:
            # several segments of one width lie below each other
            widths = {w for _, w in grids}
            if len(widths) == 1:
                return sum(h for h, _ in grids), widths.pop()
    return 1, length


@lru_cache(maxsize=256)
def _cells(shape: tuple[int, int], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Middle tokens and membership of exactly `count` cells, by bands of rows cut into pieces of equal width."""
    height, width = shape
    count = min(count, height * width)
    bands = min(height, max(1, round((count * height / width) ** 0.5), -(-count // width)))
    edges = [band * height // bands for band in range(bands + 1)]
    pieces = [(band + 1) * count // bands - band * count // bands for band in range(bands)]
    middle: list[int] = []
    cell = [0] * (height * width)
    for band, parts in enumerate(pieces):
        top, bottom = edges[band], edges[band + 1]
        for part in range(parts):
            left, right = part * width // parts, (part + 1) * width // parts
            middle.append((top + bottom - 1) // 2 * width + (left + right - 1) // 2)
            for row in range(top, bottom):
                cell[row * width + left : row * width + right] = [len(middle) - 1] * (right - left)
    return tuple(middle), tuple(cell)


def _padded(rows: list[tuple[int, ...]], tokens: Tokens) -> Int[Tensor, "B K"]:
    width = max(len(row) for row in rows)
    table = [list(row) + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(table, device=tokens.x.device)
