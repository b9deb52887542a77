"""The Triton side of greedy selection: a Gram matrix for small inputs, and the steps shared by its users.

A small input (at most `LARGEST_IN_REGISTERS` tokens, Gram matrix at most `GRAM_SHARE` times the input) runs all K steps
in one launch, one program per sample, its state in registers, one row of the Gram matrix read per step. A larger one
takes one launch per step, spread over the device, and recomputes the row from the features: a single multiprocessor
could not read the features K times. No launch waits for the host.
"""

from typing import no_type_check

import torch
from torch import Tensor

from vtc.kernels._dispatch import cdiv, lazy_jit, tl
from vtc.kernels._tiles import dot_tile, tile_blocks

LARGEST_IN_REGISTERS = 16384
GRAM_SHARE = 2
STEP_BLOCK = 32


def has_linear_gram(x: Tensor) -> bool:
    """True when the Gram matrix [N, N] stays within O(N D)."""
    return x.shape[1] <= GRAM_SHARE * x.shape[2]


def fits_one_launch(x: Tensor) -> bool:
    """True when moreover a sample's state fits one program."""
    return has_linear_gram(x) and x.shape[1] <= LARGEST_IN_REGISTERS


@lazy_jit
@no_type_check
def _gram_kernel(
    x,
    inverse,
    gram,
    num_tokens,
    width,
    x_batch,
    x_row,
    x_step,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sample = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)).to(tl.int64)
    rows_ok = rows < num_tokens
    columns_ok = columns < num_tokens
    at = x + sample * x_batch
    tile = dot_tile(
        at + rows * x_row,
        at + columns * x_row,
        rows_ok,
        columns_ok,
        x_step,
        x_step,
        width,
        BLOCK_X,
        BLOCK_Y,
        BLOCK_D,
        UPCAST,
        PRECISION,
    )
    scale = inverse + sample * num_tokens
    row_scale = tl.load(scale + rows, mask=rows_ok, other=0.0)[:, None]
    tile = tile * (row_scale * tl.load(scale + columns, mask=columns_ok, other=0.0)[None, :])
    out = gram + (sample * num_tokens + rows[:, None]) * num_tokens + columns[None, :]
    tl.store(out, tile, mask=rows_ok[:, None] & columns_ok[None, :])


def gram_triton(x: Tensor, inverse: Tensor) -> Tensor:
    """Cosine similarities [B, N, N] in float32."""
    batch, num_tokens, width = x.shape
    gram = torch.empty((batch, num_tokens, num_tokens), dtype=torch.float32, device=x.device)
    blocks = tile_blocks(x)
    grid = (cdiv(num_tokens, blocks["BLOCK_X"]), cdiv(num_tokens, blocks["BLOCK_Y"]), batch)
    _gram_kernel[grid](x, inverse, gram, num_tokens, width, *x.stride(), **blocks)
    return gram


@lazy_jit
@no_type_check
def best_of_blocks(block_best, block_pick, num_blocks, BLOCKS: tl.constexpr):
    """The (value, index) of the best block; equal values go to the lowest block, which holds the lowest indices."""
    at = tl.arange(0, BLOCKS)
    best, block = tl.max(
        tl.load(block_best + at, mask=at < num_blocks, other=float("-inf")), axis=0, return_indices=True
    )
    return best, tl.load(block_pick + tl.minimum(block, num_blocks - 1))


@lazy_jit
@no_type_check
def cosines_with(
    x_sample, inverse_sample, pick, rows, ok, width, x_row, x_step, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Cosine of a block of tokens with the token `pick` of the same sample."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    at_pick = x_sample + pick.to(tl.int64) * x_row
    for start in range(0, width, BLOCK_D):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = at < width
        tile_at = x_sample + rows[:, None] * x_row + at[None, :] * x_step
        tile = tl.load(tile_at, mask=ok[:, None] & inside[None, :], other=0.0)
        vector = tl.load(at_pick + at * x_step, mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float32) * vector.to(tl.float32)[None, :], axis=1)
    return total * tl.load(inverse_sample + rows, mask=ok, other=0.0) * tl.load(inverse_sample + pick)


def first_blocks(objective: Tensor) -> tuple[Tensor, Tensor]:
    """Best value and index (int32) per block of STEP_BLOCK tokens, [B, blocks]: what the first step reads."""
    batch, num_tokens = objective.shape
    blocks = cdiv(num_tokens, STEP_BLOCK)
    padded = torch.nn.functional.pad(objective, (0, blocks * STEP_BLOCK - num_tokens), value=float("-inf"))
    best, at = padded.view(batch, blocks, STEP_BLOCK).max(dim=-1)
    return best, (at + torch.arange(blocks, device=at.device) * STEP_BLOCK).to(torch.int32)


def last_pick(block_best: Tensor, block_pick: Tensor) -> Tensor:
    """The pick that the last step's blocks lead to, -1 when no token is left."""
    best, block = block_best.max(dim=-1, keepdim=True)
    return torch.where(best > float("-inf"), block_pick.gather(1, block), -1)[:, 0].long()
