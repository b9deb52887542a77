"""Runs of static tokens: for every token, the frame in which its unchanged run began.

    start[b, 0, s] = 0;   start[b, t, s] = start[b, t - 1, s] if similarity[b, t - 1, s] >= threshold else t

`similarity` is what `frame_similarity` returns (frame t with frame t + 1), so a run is a chain of neighbours, not a
comparison with its first frame. A token is static when its start differs from its own frame.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vtc.kernels._dispatch import Cost, cdiv, choose_path, lazy_jit, register, tl


def temporal_match(
    similarity: Float[Tensor, "B U S"], threshold: float, *, impl: str | None = None
) -> Int64[Tensor, "B T S"]:
    """Frame index at which each token's static run starts, for all T = U + 1 frames.

    >>> temporal_match(torch.tensor([[[0.9], [0.2], [0.9]]]), 0.5)[0, :, 0].tolist()
    [0, 0, 2, 2]
    """
    if impl == "reference":
        return reference(similarity, threshold)
    start: Tensor = _operator(similarity, threshold, impl)
    return start


def cost(batch: int, num_pairs: int, num_places: int) -> Cost:
    """One comparison per pair; bytes of the similarities and of the result."""
    return Cost(batch * num_pairs * num_places, batch * num_places * (4 * num_pairs + 8 * (num_pairs + 1)))


def reference(similarity: Tensor, threshold: float) -> Tensor:
    """The definition, frame by frame."""
    batch, num_pairs, num_places = similarity.shape
    start = torch.zeros(batch, num_pairs + 1, num_places, dtype=torch.int64, device=similarity.device)
    for t in range(1, num_pairs + 1):
        start[:, t] = torch.where(similarity[:, t - 1] >= threshold, start[:, t - 1], t)
    return start


def _torch(similarity: Tensor, threshold: float) -> Tensor:
    """A running maximum over the frames that begin a run."""
    frame = torch.arange(1, similarity.shape[1] + 1, device=similarity.device)[:, None]
    start = torch.where(similarity >= threshold, 0, frame)
    return torch.nn.functional.pad(start, (0, 0, 1, 0)).cummax(dim=1).values


@lazy_jit
@no_type_check
def _run_kernel(
    similarity, start, num_pairs, num_places, threshold, batch_step, pair_step, place_step, BLOCK: tl.constexpr
):
    """The runs of a block of places, frame by frame."""
    sample = tl.program_id(1).to(tl.int64)
    places = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    ok = places < num_places
    at = similarity + sample * batch_step + places * place_step
    out = start + sample * (num_pairs + 1) * num_places + places
    current = tl.zeros((BLOCK,), dtype=tl.int64)
    tl.store(out, current, mask=ok)
    for pair in range(0, num_pairs):
        value = tl.load(at + pair * pair_step, mask=ok, other=0.0).to(tl.float32)
        current = tl.where(value >= threshold, current, pair + 1)
        tl.store(out + (pair + 1) * num_places, current, mask=ok)


def _triton(similarity: Tensor, threshold: float) -> Tensor:
    batch, num_pairs, num_places = similarity.shape
    start = torch.empty((batch, num_pairs + 1, num_places), dtype=torch.int64, device=similarity.device)
    if start.numel():
        _run_kernel[(cdiv(num_places, 128), batch)](
            similarity, start, num_pairs, num_places, float(threshold), *similarity.stride(), BLOCK=128
        )
    return start


def _fake(similarity: Tensor, threshold: float, impl: str | None) -> Tensor:
    batch, num_pairs, num_places = similarity.shape
    return similarity.new_empty((batch, num_pairs + 1, num_places), dtype=torch.int64)


def _flops(similarity: Any, threshold: float, impl: str | None) -> int:
    return cost(*similarity).flops


@register("temporal_match", fake=_fake, flops=_flops)
def _operator(similarity: Tensor, threshold: float, impl: str | None) -> Tensor:
    run = _triton if choose_path(similarity, impl).name == "triton" else _torch
    return run(similarity, threshold)
