"""Small batched functions that methods are composed of. Hot ones are backed by `vtc.kernels`.

All work on [B, N, ...] tensors with a validity mask, loop over neither samples nor tokens, and leave their inputs
unchanged.
"""

from vtc.indices import shift
from vtc.primitives.bipartite import bipartite_keep, bipartite_links
from vtc.primitives.clustering import density_peaks
from vtc.primitives.correlation import targets_above, top_links
from vtc.primitives.diversity import density_centers, distinct_of, unlike_picks
from vtc.primitives.merging import (
    add_mean,
    assign_nearest,
    mean_merge,
    self_preserving_merge,
    size_weighted_merge,
    sum_merge,
)
from vtc.primitives.pacing import even_pace, geometric_pace, linear_counts, linear_pace
from vtc.primitives.pagerank import attention_pagerank
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
from vtc.primitives.text import instruction
from vtc.primitives.tiles import of_full, per_image, seats

__all__ = [
    "add_mean",
    "ascending",
    "assign_nearest",
    "at_most",
    "attention_pagerank",
    "bipartite_keep",
    "bipartite_links",
    "canvas_order",
    "density_centers",
    "density_peaks",
    "distinct_of",
    "even_pace",
    "geometric_pace",
    "grid_cells",
    "instruction",
    "join_keep",
    "keep_where",
    "linear_counts",
    "linear_pace",
    "mean_merge",
    "of_full",
    "per_image",
    "pool_units",
    "quantile",
    "ranks",
    "ranks_within",
    "rest_of",
    "seats",
    "seeded_uniform",
    "segment_table",
    "self_preserving_merge",
    "settle",
    "settled",
    "shift",
    "size_weighted_merge",
    "slot_of",
    "sum_merge",
    "take_rows",
    "targets_above",
    "top_links",
    "topk_keep",
    "uniform_keep",
    "unlike_picks",
    "valid_prefix",
]
