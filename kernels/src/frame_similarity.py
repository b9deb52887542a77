"""Cosine of every token with the token at the same place one frame later.

    out[b, t, s] = cos(x[b, t, s], x[b, t + 1, s])

A zero vector has similarity 0. One frame (or none) gives an empty result. One reading of x is enough.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from vtc.kernels._cosine import WORKSPACE_BYTES, accumulator, chunks, normalise
from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, next_power_of_two, register, tl


def frame_similarity(x: Float[Tensor, "B T S D"], *, impl: str | None = None) -> Float[Tensor, "B U S"]:
    """Same-place cosine similarity of neighbouring frames, float32, U = T - 1.

    >>> frame_similarity(torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]]])).tolist()
    [[[1.0], [0.0]]]
    """
    if impl == "reference":
        return reference(x)
    similarity: Tensor = _operator(x, impl)
    return similarity


def cost(batch: int, num_frames: int, num_places: int, width: int, itemsize: int = 4) -> Cost:
    """Three dot products per pair; bytes of one reading and of the result."""
    pairs = batch * max(0, num_frames - 1) * num_places
    return Cost(6 * pairs * width, batch * num_frames * num_places * width * itemsize + 4 * pairs)


def reference(x: Tensor) -> Tensor:
    """The definition."""
    unit = normalise(x)
    return (unit[:, :-1] * unit[:, 1:]).sum(dim=-1)


def _torch(x: Tensor) -> Tensor:
    """Blocks of places, so that the products stay in the cache; each norm is computed once."""
    batch, num_frames, num_places, width = x.shape
    dtype = accumulator(x)
    similarity = x.new_zeros((batch, max(0, num_frames - 1), num_places), dtype=dtype)
    step = max(1, WORKSPACE_BYTES // (8 * max(1, width)))
    for b in range(batch):
        for places in chunks(num_places, step):
            earlier, earlier_norm = None, None
            for t in range(num_frames):
                frame = x[b, t, places].to(dtype)
                norm = torch.linalg.vector_norm(frame, dim=-1)
                if earlier is not None:
                    dots = (earlier * frame).sum(dim=-1)
                    scale = earlier_norm * norm
                    similarity[b, t - 1, places] = torch.where(scale > 0, dots / scale, 0.0)
                earlier, earlier_norm = frame, norm
    return similarity


@lazy_jit
@no_type_check
def _frame_kernel(
    x,
    similarity,
    num_pairs,
    num_places,
    width,
    x_batch,
    x_frame,
    x_place,
    x_step,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One pair of frames per program; neighbours in time run side by side and share a frame in the cache."""
    sample = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64)
    places = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = places < num_places
    at_place = x + sample * x_batch + pair * x_frame + places * x_place
    dots = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.zeros((BLOCK,), dtype=tl.float32)
    second = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        seen = ok[:, None] & (at < width)[None, :]
        tile_at = at_place[:, None] + at[None, :] * x_step
        earlier = tl.load(tile_at, mask=seen, other=0.0).to(tl.float32)
        later = tl.load(tile_at + x_frame, mask=seen, other=0.0).to(tl.float32)
        dots += tl.sum(earlier * later, axis=1)
        first += tl.sum(earlier * earlier, axis=1)
        second += tl.sum(later * later, axis=1)
    scale = tl.sqrt(first) * tl.sqrt(second)
    result = tl.where(scale > 0, dots / tl.where(scale > 0, scale, 1.0), 0.0)
    tl.store(similarity + (sample * num_pairs + pair) * num_places + places, result, mask=ok)


def _triton(x: Tensor) -> Tensor:
    batch, num_frames, num_places, width = x.shape
    num_pairs = max(0, num_frames - 1)
    similarity = torch.empty((batch, num_pairs, num_places), dtype=torch.float32, device=x.device)
    if similarity.numel():
        block = min(512, max(16, next_power_of_two(width)))
        grid = (num_pairs, cdiv(num_places, 8), batch)
        _frame_kernel[grid](x, similarity, num_pairs, num_places, width, *x.stride(), BLOCK=8, BLOCK_D=block)
    return similarity


def _fake(x: Tensor, impl: str | None) -> Tensor:
    return x.new_empty((x.shape[0], max(0, x.shape[1] - 1), x.shape[2]), dtype=accumulator(x))


def _flops(x: Any, impl: str | None) -> int:
    return cost(*x).flops


@register("frame_similarity", fake=_fake, flops=_flops)
def _operator(x: Tensor, impl: str | None) -> Tensor:
    return _triton(x) if choose_path(x, impl).name == "triton" else _torch(x)
