"""Pixels as pictures: from what a model is called with, [3, H, W] for each tile and frame, in the order of layouts."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtc.adapter import Picture
from vtc.errors import InputError


def single_images(pixels: Tensor) -> list[Picture]:
    """[images, 3, H, W]: each a picture of its own.

    Raises:
        InputError: another shape.
    """
    check(pixels, 4, "[images, 3, height, width]")
    return [Picture((image,)) for image in pixels]


def clips(pixels: Tensor) -> list[Picture]:
    """[videos, frames, 3, H, W]: a segment for each frame.

    Raises:
        InputError: another shape.
    """
    check(pixels, 5, "[videos, frames, 3, height, width]")
    return [Picture(tuple(frames), "video", tiles=None) for frames in pixels]


def split_tiles(pixels: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The tiles [tiles, 3, H, W] of each image; `pixels` hold them padded to the image with the most, or in a row.

    Raises:
        InputError: neither.
    """
    if pixels.dim() == 5 and len(pixels) == len(counts) and max(counts) <= pixels.shape[1]:
        return [tiles[:count] for tiles, count in zip(pixels, counts, strict=True)]
    if pixels.dim() == 4 and len(pixels) == sum(counts):
        return list(pixels.split(list(counts)))
    raise InputError(f"pixels of shape {tuple(pixels.shape)} are not those of images of {list(counts)} tiles.")


def with_overview(tiles: Tensor) -> Picture:
    """Tiles [tiles, 3, H, W] in raster order; where there are several, the last shows the whole image instead.

    A model's inputs do not name the rows: they are those in which the tiles together look most like the whole.
    """
    *parts, whole = tiles.float()
    if not parts:
        return Picture((tiles[0],))

    def distance(rows: int) -> float:
        together = mosaic(torch.stack(parts), rows)[None]
        return float((nn.functional.interpolate(together, whole.shape[1:], mode="area")[0] - whole).abs().mean())

    rows = min((rows for rows in range(1, len(parts) + 1) if len(parts) % rows == 0), key=distance)
    return Picture(tuple(tiles), tiles=(rows, len(parts) // rows), overview=len(parts))


def mosaic(tiles: Tensor, rows: int) -> Tensor:
    """Tiles [rows * columns, C, H, W] in raster order as one picture [C, rows * H, columns * W]."""
    return tiles.unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def runs(is_visual: Tensor) -> list[list[tuple[int, int]]]:
    """First column and length of each run of placeholders of each prompt; `is_visual` is bool [B, S]."""
    found = []
    for row in is_visual.tolist():
        groups = [(visual, len(list(group))) for visual, group in itertools.groupby(row)]
        starts = itertools.accumulate((length for _, length in groups), initial=0)
        found.append([(start, n) for start, (visual, n) in zip(starts, groups, strict=False) if visual])
    return found


def check(pixels: Tensor, dims: int, shape: str) -> None:
    """Refuse pixels of other than `dims` dimensions, `shape` in words, or with no channels before the last two.

    Raises:
        InputError: they are.
    """
    if pixels.dim() != dims or pixels.shape[-3] not in (1, 3):
        raise InputError(f"pixels of shape {tuple(pixels.shape)} are no pictures; those of this family are {shape}.")
