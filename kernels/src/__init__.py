"""Fused similarity, attention-score, selection and gather operations: torch everywhere, Triton on CUDA and ROCm.

Every operation is one file with its contract, a plain reference, a torch path that stores no N x N matrix, and a Triton
path. `impl="reference" | "torch" | "triton"` picks who computes, never what is computed; `choose_path` says why.
"""

from vtc.kernels._dispatch import Cost, Path, choose_path
from vtc.kernels.attention_rows import attention_rows
from vtc.kernels.compact import Compacted, compact
from vtc.kernels.cosine_match import bipartite_match, cosine_match
from vtc.kernels.diversity import farthest_point, max_min, max_sum
from vtc.kernels.dpp_map import dpp_map, dpp_map_features
from vtc.kernels.frame_similarity import frame_similarity
from vtc.kernels.received_attention import received_attention
from vtc.kernels.segment_merge import segment_merge
from vtc.kernels.similarity_degree import similarity_degree, similarity_propagate
from vtc.kernels.temporal_match import temporal_match

__all__ = [
    "Compacted",
    "Cost",
    "Path",
    "attention_rows",
    "bipartite_match",
    "choose_path",
    "compact",
    "cosine_match",
    "dpp_map",
    "dpp_map_features",
    "farthest_point",
    "frame_similarity",
    "max_min",
    "max_sum",
    "received_attention",
    "segment_merge",
    "similarity_degree",
    "similarity_propagate",
    "temporal_match",
]
