"""Rotary position embedding in the half-split form of all supported decoders and towers."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(x: Float[Tensor, "B H L d"], cos: Float[Tensor, "B L d"], sin: Float[Tensor, "B L d"]) -> Tensor:
    """x cos + (-right half, left half) sin."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]
