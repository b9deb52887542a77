"""Small batched functions that methods are composed of. Hot ones are backed by `vtc.kernels`.

All work on [B, N, ...] tensors with a validity mask, loop over neither samples nor tokens, and leave their inputs
unchanged.
"""

from vtc.primitives.merging import add_mean, assign_nearest, mean_merge, self_preserving_merge
from vtc.primitives.selection import ascending, join_keep, rest_of, take_rows, topk_keep, valid_prefix
from vtc.primitives.spatial import canvas_order, grid_cells, pool_units, uniform_keep

__all__ = [
    "add_mean",
    "ascending",
    "assign_nearest",
    "canvas_order",
    "grid_cells",
    "join_keep",
    "mean_merge",
    "pool_units",
    "rest_of",
    "self_preserving_merge",
    "take_rows",
    "topk_keep",
    "uniform_keep",
    "valid_prefix",
]
