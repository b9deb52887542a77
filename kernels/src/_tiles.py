"""What the Triton kernels share: the tile of dot products, the inverse norms, and the choice of block sizes.

A tile keeps 16-bit inputs as they are for the matrix units (products are exact in the float32 accumulator) and splits
float32 inputs in three tf32 terms where the hardware has them. The interpreter computes bfloat16 wrongly, so there
everything is converted right after the load.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from vtc.kernels._dispatch import cdiv, is_interpreting, lazy_jit, next_power_of_two, tl

PROGRAMS_WANTED = 264  # two per multiprocessor of an H200, so that a small batch still fills it


@lazy_jit
@no_type_check
def dot_tile(
    x_row,
    y_row,
    x_ok,
    y_ok,
    x_step,
    y_step,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 dot products [BLOCK_X, BLOCK_Y] of the rows at the pointers `x_row` and `y_row`."""
    accumulator = tl.zeros((BLOCK_X, BLOCK_Y), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = at < width
        x = tl.load(x_row[:, None] + at[None, :] * x_step, mask=x_ok[:, None] & inside[None, :], other=0.0)
        y = tl.load(y_row[None, :] + at[:, None] * y_step, mask=y_ok[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        accumulator = tl.dot(x, y, accumulator, input_precision=PRECISION)
    return accumulator


@lazy_jit
@no_type_check
def _inverse_norm_kernel(
    x, inverse, num_rows, width, x_batch, x_row, x_step, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    ok = rows < num_rows
    at_row = x + sample * x_batch + rows * x_row
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        at = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        tile = tl.load(at_row[:, None] + at[None, :] * x_step, mask=ok[:, None] & (at < width)[None, :], other=0.0)
        tile = tile.to(tl.float32)
        total += tl.sum(tile * tile, axis=1)
    result = tl.where(total > 0, 1.0 / tl.sqrt(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(inverse + sample * num_rows + rows, result, mask=ok)


def inverse_norm_triton(x: Tensor) -> Tensor:
    """1 / |x| of every row of [B, N, D], float32, 0 for zero rows."""
    batch, num_rows, width = x.shape
    inverse = torch.empty((batch, num_rows), dtype=torch.float32, device=x.device)
    if inverse.numel():
        grid = (cdiv(num_rows, 8), batch)
        block = min(1024, max(16, next_power_of_two(width)))
        _inverse_norm_kernel[grid](x, inverse, num_rows, width, *x.stride(), BLOCK_ROWS=8, BLOCK_D=block)
    return inverse


def tile_blocks(x: Tensor) -> dict[str, Any]:
    """Block sizes and arithmetic of `dot_tile` for this input."""
    is_wide = x.dtype == torch.float32
    width = max(16, next_power_of_two(x.shape[-1]))
    return {
        "BLOCK_X": 64,
        "BLOCK_Y": 64 if is_wide else 128,
        "BLOCK_D": min(32 if is_wide else 64, width),
        **dot_arithmetic(x),
    }


def dot_arithmetic(x: Tensor) -> dict[str, Any]:
    """UPCAST and PRECISION: exact products for 16-bit inputs, float32-like ones for float32."""
    has_tf32 = x.device.type == "cuda" and torch.version.hip is None and not is_interpreting()
    return {"UPCAST": is_interpreting(), "PRECISION": "tf32x3" if has_tf32 else "ieee"}


def split_columns(programs: int, num_columns: int, block: int) -> tuple[int, int]:
    """(number of splits, columns per split): enough programs to fill the device, each with whole blocks."""
    blocks = cdiv(num_columns, block)
    splits = max(1, min(blocks, cdiv(PROGRAMS_WANTED, max(1, programs))))
    per_split = cdiv(blocks, splits) * block
    return cdiv(num_columns, per_split), per_split
