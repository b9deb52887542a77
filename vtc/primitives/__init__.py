"""Small batched functions that methods are composed of. Hot ones are backed by `vtc.kernels`.

All work on [B, N, ...] tensors with a validity mask, loop over neither samples nor tokens, and leave their inputs
unchanged.
"""

from vtc.primitives.diversity import density_centers, distinct_of, unlike_picks
from vtc.primitives.merging import add_mean, assign_nearest, mean_merge, self_preserving_merge
from vtc.primitives.ranking import (
    at_most,
    keep_where,
    quantile,
    ranks,
    ranks_within,
    seeded_uniform,
    settle,
    settled,
    slot_of,
)
from vtc.primitives.selection import ascending, join_keep, rest_of, take_rows, topk_keep, valid_prefix
from vtc.primitives.spatial import canvas_order, grid_cells, pool_units, segment_table, uniform_keep

__all__ = [
    "add_mean",
    "ascending",
    "assign_nearest",
    "at_most",
    "canvas_order",
    "density_centers",
    "distinct_of",
    "grid_cells",
    "join_keep",
    "keep_where",
    "mean_merge",
    "pool_units",
    "quantile",
    "ranks",
    "ranks_within",
    "rest_of",
    "seeded_uniform",
    "segment_table",
    "self_preserving_merge",
    "settle",
    "settled",
    "slot_of",
    "take_rows",
    "topk_keep",
    "uniform_keep",
    "unlike_picks",
    "valid_prefix",
]
