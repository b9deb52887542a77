"""What `python -m vtc.eval.kernel_bench` measures: one setup per operation, the same inputs for every provider.

Eager is the reference, except for greedy selection: there it is the usual code, with the whole matrix once and one row
per step. Inputs are drawn on the device with a fixed seed and shared by all operations of one size.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtc.kernels as kernels
from vtc.kernels.attention_rows import cost as attention_rows_cost
from vtc.kernels.compact import cost as compact_cost
from vtc.kernels.cosine_match import cost as cosine_match_cost
from vtc.kernels.diversity import cost as diversity_cost
from vtc.kernels.dpp_map import cost as dpp_map_cost
from vtc.kernels.frame_similarity import cost as frame_similarity_cost
from vtc.kernels.received_attention import cost as received_attention_cost
from vtc.kernels.segment_merge import cost as segment_merge_cost
from vtc.kernels.similarity_degree import cost as similarity_degree_cost

PICKS = 64
HEAD_WIDTH = 64
FRAMES = 16
SHARED = 1.2  # weight of the part that all tokens of `alike` share: cosines around 0.59, as among tokens of one image

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """One point of the grid."""

    num_tokens: int
    width: int
    batch: int


@dataclass(frozen=True)
class Case:
    """One operation at one size; `eager_bytes` is about what the eager path needs beside the inputs."""

    run: Callable[[str], Any]
    eager: Call
    cost: kernels.Cost
    eager_bytes: int
    input_bytes: int


class Inputs:
    """Random inputs of one size and dtype, each drawn when a setup asks for it (not when it runs)."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.itemsize = dtype.itemsize
        self.heads = size.width // HEAD_WIDTH
        self.input_bytes = size.batch * size.num_tokens * size.width * self.itemsize

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @functools.cached_property
    def x(self) -> Tensor:
        shape = (self.size.batch, self.size.num_tokens, self.size.width)
        return torch.randn(shape, generator=self._generator(0), dtype=self.dtype, device=self.device)

    @functools.cached_property
    def reversed(self) -> Tensor:
        return self.x.flip(1)

    @functools.cached_property
    def alike(self) -> Tensor:
        shape = (self.size.batch, 1, self.size.width)
        shared = torch.randn(shape, generator=self._generator(1), dtype=self.dtype, device=self.device)
        return self.x + SHARED * shared

    @functools.cached_property
    def score(self) -> Tensor:
        return torch.rand(self.size.batch, self.size.num_tokens, generator=self._generator(2), device=self.device)

    @functools.cached_property
    def index(self) -> Tensor:
        return torch.arange(0, self.size.num_tokens, 4, device=self.device).expand(self.size.batch, -1)

    @functools.cached_property
    def assignment(self) -> Tensor:
        shape, slots = (self.size.batch, self.size.num_tokens), max(1, self.size.num_tokens // 4)
        return torch.randint(0, slots, shape, generator=self._generator(3), device=self.device)

    @functools.cached_property
    def position_ids(self) -> Tensor:
        shape = (3, self.size.batch, self.size.num_tokens)
        return torch.arange(self.size.num_tokens, device=self.device).expand(shape)

    @functools.cached_property
    def q(self) -> Tensor:
        return self.x.view(*self.x.shape[:2], self.heads, HEAD_WIDTH).transpose(1, 2)

    @functools.cached_property
    def k(self) -> Tensor:
        return self.q.flip(2)

    @functools.cached_property
    def frames(self) -> Tensor:
        places = self.size.num_tokens // FRAMES
        return self.x[:, : places * FRAMES].view(self.size.batch, FRAMES, places, self.size.width)


def similarity_count(i: Inputs) -> Case:
    x = i.x

    def run(impl: str) -> Tensor:
        return kernels.similarity_degree(x, reduce="count", threshold=0.1, impl=impl)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=1, itemsize=i.itemsize))


def similarity_mean(i: Inputs) -> Case:
    x = i.x

    def run(impl: str) -> Tensor:
        return kernels.similarity_degree(x, reduce="mean", impl=impl)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=0, itemsize=i.itemsize))


def similarity_propagate(i: Inputs) -> Case:
    """Five steps as G-Prune takes them, over about half of all pairs."""
    return _propagation(i, threshold=0.59, temperature=0.03)


def similarity_propagate_dense(i: Inputs) -> Case:
    """Five steps over all pairs: nothing is sparse."""
    return _propagation(i, temperature=0.1)


def _propagation(i: Inputs, *, temperature: float, threshold: float | None = None) -> Case:
    x, score = i.alike, i.score

    def run(impl: str) -> Tensor:
        options: dict[str, Any] = {"threshold": threshold, "temperature": temperature, "steps": 5, "transpose": True}
        return kernels.similarity_propagate(x, score, impl=impl, **options)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=1, itemsize=i.itemsize))


def cosine_match(i: Inputs) -> Case:
    x, reversed_x = i.x, i.reversed

    def run(impl: str) -> tuple[Tensor, Tensor]:
        return kernels.cosine_match(x, reversed_x, impl=impl)

    count = i.size.num_tokens
    return _square(i, run, cosine_match_cost(i.size.batch, count, count, i.size.width, i.itemsize))


def received_attention(i: Inputs) -> Case:
    q, k = i.q, i.k

    def run(impl: str) -> Tensor:
        return kernels.received_attention(q, k, impl=impl)

    sizes = (i.size.batch, i.heads, i.heads, i.size.num_tokens, HEAD_WIDTH)
    return _square(i, run, received_attention_cost(*sizes, itemsize=i.itemsize), matrices=5 * i.heads)


def attention_rows(i: Inputs) -> Case:
    q, k = i.q, i.k

    def run(impl: str) -> Tensor:
        return kernels.attention_rows(q[:, :, -4:], k, impl=impl)

    sizes = (i.size.batch, i.heads, i.heads, 4, i.size.num_tokens, HEAD_WIDTH)
    case_cost = attention_rows_cost(*sizes, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 3 * i.input_bytes, i.input_bytes)


def farthest_point(i: Inputs) -> Case:
    x = i.x

    def run(impl: str) -> Tensor:
        return kernels.farthest_point(x, PICKS, impl=impl)

    def eager() -> Tensor:
        return eager_greedy(x, PICKS)

    case_cost = diversity_cost(*_shape(i), PICKS, is_seeded=False, is_sum=False, itemsize=i.itemsize)
    return _square(i, run, case_cost, eager=eager)


def max_sum(i: Inputs) -> Case:
    x = i.x
    start = torch.zeros(i.size.batch, dtype=torch.int64, device=x.device)

    def run(impl: str) -> Tensor:
        return kernels.max_sum(x, PICKS, start=start, impl=impl)

    def eager() -> Tensor:
        return eager_greedy(x, PICKS, start)

    case_cost = diversity_cost(*_shape(i), PICKS, is_seeded=True, is_sum=True, itemsize=i.itemsize)
    return _square(i, run, case_cost, eager=eager)


def dpp_map(i: Inputs) -> Case:
    x, score = i.x, i.score

    def run(impl: str) -> Tensor:
        return kernels.dpp_map_features(x, score, PICKS, impl=impl)

    def eager() -> Tensor:
        return eager_dpp(x, score, PICKS)

    return _square(i, run, dpp_map_cost(*_shape(i), PICKS, itemsize=i.itemsize), eager=eager)


def segment_merge(i: Inputs) -> Case:
    x, assignment, score = i.x, i.assignment, i.score
    slots = max(1, i.size.num_tokens // 4)

    def run(impl: str) -> Tensor:
        return kernels.segment_merge(x, assignment, slots, weights=score, impl=impl)

    return _square(i, run, segment_merge_cost(*_shape(i), slots, itemsize=i.itemsize), matrices=1)


def frame_similarity(i: Inputs) -> Case:
    frames = i.frames

    def run(impl: str) -> Tensor:
        return kernels.frame_similarity(frames, impl=impl)

    sizes = (i.size.batch, FRAMES, i.size.num_tokens // FRAMES, i.size.width)
    case_cost = frame_similarity_cost(*sizes, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 4 * i.input_bytes, i.input_bytes)


def compact(i: Inputs) -> Case:
    index, x, position_ids = i.index, i.x, i.position_ids

    def run(impl: str) -> kernels.Compacted:
        return kernels.compact(index, x, position_ids=position_ids, impl=impl)

    case_cost = compact_cost(i.size.batch, index.shape[1], i.size.width, 24, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 2 * i.input_bytes, i.input_bytes)


SETUPS: dict[str, Callable[[Inputs], Case]] = {
    "attention_rows": attention_rows,
    "compact": compact,
    "cosine_match": cosine_match,
    "dpp_map": dpp_map,
    "farthest_point": farthest_point,
    "frame_similarity": frame_similarity,
    "max_sum": max_sum,
    "received_attention": received_attention,
    "segment_merge": segment_merge,
    "similarity_count": similarity_count,
    "similarity_mean": similarity_mean,
    "similarity_propagate": similarity_propagate,
    "similarity_propagate_dense": similarity_propagate_dense,
}


def _shape(i: Inputs) -> tuple[int, int, int]:
    return i.size.batch, i.size.num_tokens, i.size.width


def _square(
    i: Inputs, run: Callable[[str], Any], cost: kernels.Cost, *, eager: Call | None = None, matrices: int = 5
) -> Case:
    """A case whose eager path holds `matrices` float32 matrices of N x N beside two float32 copies of the input."""
    batch, count, width = _shape(i)
    eager_bytes = 4 * batch * (matrices * count * count + 2 * count * width)
    return Case(run, eager or (lambda: run("reference")), cost, eager_bytes, i.input_bytes)


def eager_greedy(x: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    """The usual eager selection: whole distance matrix, one row per step. Max-min, or max-sum with a `start`."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    picks = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    pick = distance.topk(2, dim=-1, largest=False).values[..., 1].argmax(dim=-1) if start is None else start
    reach: Tensor | None = None
    for step in range(k):
        picks[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        row = torch.take_along_dim(distance, pick[:, None, None], dim=1)[:, 0]
        if reach is None:
            reach = row
        else:
            reach = torch.minimum(reach, row) if start is None else reach + row
        pick = reach.masked_fill(taken, -math.inf).argmax(dim=-1)
    return picks


def eager_dpp(x: Tensor, quality: Tensor, k: int) -> Tensor:
    """The usual eager greedy MAP: whole kernel, Cholesky rows."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    kernel = quality[:, :, None] * (unit @ unit.mT) * quality[:, None]
    variance = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = torch.zeros(x.shape[0], k, x.shape[1], device=x.device)
    picks = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    for step in range(k):
        best, pick = variance.max(dim=-1, keepdim=True)
        picks[:, step] = pick[:, 0]
        row = torch.take_along_dim(kernel, pick[..., None], dim=1)[:, 0]
        earlier = rows[:, :step]
        row = (row - (torch.take_along_dim(earlier, pick[..., None], dim=2) * earlier).sum(dim=1)) / best.sqrt()
        rows[:, step] = row
        variance = (variance - row.square()).scatter(1, pick, -math.inf)
    return picks
