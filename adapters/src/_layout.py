"""Layouts of images that differ in size."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.host import names
from vtc.tokens import Layout

#: row, column and segment of the tokens of one image
Places = tuple[Tensor, Tensor, Tensor]
Grids = tuple[tuple[int, int], ...]


def raster(grids: Iterable[tuple[int, int]]) -> Places:
    """Row, column and segment of full raster grids, one after the other."""
    parts = []
    for number, (height, width) in enumerate(grids):
        place = torch.arange(height * width)
        parts.append(torch.stack([place // width, place % width, torch.full_like(place, number)]))
    row, col, segment = torch.cat(parts, dim=1)
    return row, col, segment


def ragged_layout(places: Sequence[Places], grids: Sequence[Grids], device: torch.device | None = None) -> Layout:
    """The layout of images with these places, padded with -1 to the longest."""

    def pad(parts: Sequence[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=-1)

    row, col, segment = (pad(parts) for parts in zip(*places, strict=True))
    layout = Layout(row, col, segment, tuple(tuple(one) for one in grids))
    return layout if device is None else layout.to(device)


def clip_shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Videos and frames of a call of `get_video_features`; older hosts name its pixels `pixel_values`."""
    pixels = arguments[names.VIDEO_PIXELS] if names.VIDEO_PIXELS in arguments else arguments[names.PIXELS]
    videos, frames = pixels.shape[:2]
    return videos, frames


def block_mean(signal: Tensor, side: int, block: int) -> Tensor:
    """Mean over blocks of block x block patches of a square raster grid: [G, side^2, C] -> [G, (side/block)^2, C]."""
    groups, _, channels = signal.shape
    cells = signal.reshape(groups, side // block, block, side // block, block, channels)
    return cells.mean(dim=(2, 4)).flatten(1, 2)
