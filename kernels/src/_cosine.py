"""Cosine similarity in tiles: what the torch paths of several operations share.

A cosine is `dot(x, y) / (|x| |y|)` in the accumulator type, with no epsilon; a zero vector has similarity 0 to
everything. A vector whose squared norm underflows counts as zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 768
SYMMETRIC_TILE = 320
DEVICE_TILE = 2048
LEAST_TILE = 256
WORKSPACE_BYTES = 2 << 20
LANES = 32


def accumulator(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input (an oracle), float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(total)` in order."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def tile_size(x: Tensor, num_columns: int, most: int | None = None) -> int:
    """Rows per tile: about a third of the tokens, and fewer when rows must be converted to the accumulator type."""
    most = (most or TILE) if x.device.type == "cpu" else DEVICE_TILE
    third = -(-max(x.shape[1], num_columns) // (3 * LANES)) * LANES
    tile = max(LEAST_TILE, min(most, third))
    if x.dtype == accumulator(x):
        return tile
    return max(64, min(tile, WORKSPACE_BYTES // (4 * max(1, x.shape[-1]))))


def normalise(x: Tensor) -> Tensor:
    """x / |x| in the accumulator type; zero vectors stay zero. The form the references use."""
    x = x.to(accumulator(x))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, 0.0)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension of [B, N, D], 0 for zero vectors, without a converted copy of x."""
    dtype = accumulator(x)
    norm = x.new_empty(x.shape[:-1], dtype=dtype)
    step = x.shape[1] if x.dtype == dtype else WORKSPACE_BYTES // (4 * max(1, x.shape[0] * x.shape[-1]))
    for rows in chunks(x.shape[1], max(1, step)):
        norm[:, rows] = torch.linalg.vector_norm(x[:, rows].to(dtype), dim=-1)
    return torch.where(norm > 0, norm.reciprocal(), 0.0)


def cosine_tiles(
    x: Tensor, y: Tensor, x_inverse: Tensor | None, y_inverse: Tensor
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Yields (samples, rows, columns, cosines of x[samples, rows] with y[samples, columns]); columns vary slowest.

    Without `x_inverse` the tiles are not divided by |x|, which is enough to rank the columns of a row.
    """
    num_rows, num_columns = x.shape[1], y.shape[1]
    tile = tile_size(x, num_columns)
    group = max(1, tile * tile // max(1, num_rows * num_columns))
    for samples in chunks(x.shape[0], group):
        for columns in chunks(num_columns, tile):
            right = y[samples, columns].to(y_inverse.dtype).transpose(1, 2)
            for rows in chunks(num_rows, tile):
                yield samples, rows, columns, _tile(x, right, x_inverse, y_inverse, samples, rows, columns)


Place = tuple[slice, slice, slice]


def symmetric_places(x: Tensor) -> Iterator[Place]:
    """(samples, rows, columns) of the tiles on and above the diagonal of x x^T; the last tile of a column is on it."""
    num_tokens = x.shape[1]
    tile = tile_size(x, num_tokens, SYMMETRIC_TILE)
    group = max(1, tile * tile // max(1, num_tokens * num_tokens))
    for samples in chunks(x.shape[0], group):
        for columns in chunks(num_tokens, tile):
            for rows in chunks(columns.stop, tile):
                yield samples, rows, columns


def cosine_tile(x: Tensor, x_inverse: Tensor, place: Place) -> Tensor:
    """Cosines of x[samples, rows] with x[samples, columns], a new tensor."""
    samples, _, columns = place
    right = x[samples, columns].to(x_inverse.dtype).transpose(1, 2)
    return _tile(x, right, x_inverse, x_inverse, *place)


def symmetric_tiles(x: Tensor, x_inverse: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Like `cosine_tiles(x, x)`, but only tiles on and above the diagonal: half the work, and s_ij is s_ji exactly."""
    for place in symmetric_places(x):
        yield *place, cosine_tile(x, x_inverse, place)


def _tile(
    x: Tensor, right: Tensor, x_inverse: Tensor | None, y_inverse: Tensor, samples: slice, rows: slice, columns: slice
) -> Tensor:
    tile = torch.bmm(x[samples, rows].to(right.dtype), right).mul_(y_inverse[samples, None, columns])
    return tile if x_inverse is None else tile.mul_(x_inverse[samples, rows, None])


def cosine_to(x: Tensor, x_inverse: Tensor, token: Tensor) -> Tensor:
    """Cosine of every token with one token of its sample; `token` (B) holds indices."""
    dtype = x_inverse.dtype
    at = token[:, None]
    vector = torch.take_along_dim(x, at[..., None], dim=1).to(dtype) * torch.take_along_dim(x_inverse, at, 1)[..., None]
    if x.shape[0] == 1 and x.dtype == dtype:
        return torch.mv(x[0], vector[0, 0])[None] * x_inverse
    dots = torch.empty_like(x_inverse)
    step = x.shape[1] if x.dtype == dtype else max(1, WORKSPACE_BYTES // (4 * max(1, x.shape[0] * x.shape[2])))
    for rows in chunks(x.shape[1], max(1, step)):
        dots[:, rows] = torch.bmm(x[:, rows].to(dtype), vector.transpose(1, 2))[..., 0]
    return dots * x_inverse


def masked_columns(tile: Tensor, is_column: Tensor | None) -> Tensor:
    """The tile with -inf in the columns that are not valid, in place; adding is far cheaper than a masked fill."""
    if is_column is None:
        return tile
    penalty = torch.where(is_column, 0.0, float("-inf")).to(tile.dtype)
    return tile.add_(penalty[..., None, :])


def top_first(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of the last dimension, ties to the lowest index (what `torch.topk` does not promise)."""
    if k == 1:
        return _best_first(similarity)
    values, index = torch.sort(similarity, dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]


def _best_first(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """`max` with its first index. On the CPU by lanes: maxima alone are vectorised, maxima with an index are not."""
    num_columns = similarity.shape[-1]
    if similarity.device.type != "cpu" or num_columns < 2 * LANES or num_columns % LANES:
        best = similarity.max(dim=-1, keepdim=True)
        return best.values, best.indices
    lanes = similarity.unflatten(-1, (-1, LANES))
    lane = lanes.amax(dim=-1).max(dim=-1, keepdim=True).indices
    best = torch.take_along_dim(lanes, lane[..., None], dim=-2)[..., 0, :].max(dim=-1, keepdim=True)
    return best.values, lane * LANES + best.indices
