"""Qwen2.5-VL: as Qwen2-VL, with window attention in all but a few blocks of the tower.

The tower keeps merge blocks in the order of its windows and only restores what leaves the merger, so its signals are
restored here. They come from the last block that attends to whole frames.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtc.adapter import register_adapter
from vtc.adapters._qwen import QwenAdapter


@register_adapter
class Qwen25VLAdapter(QwenAdapter):
    """`Qwen2_5_VLForConditionalGeneration`."""

    family = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    checkpoints = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct")

    @property
    def signal_block(self) -> Any:
        tower = self.inner.visual
        return tower.blocks[max(tower.fullatt_block_indexes, default=-1)]

    def merged_order(self, arguments: Mapping[str, Any], device: torch.device) -> Tensor | None:
        tower = self.inner.visual
        side = tower.window_size // tower.spatial_merge_size // tower.patch_size  # tokens on a window's side
        orders, start = [], 0
        for t, h, w in self.merged_grids(arguments):
            place = torch.arange(t * h * w)
            frame, row, col = place // (h * w), place // w % h, place % w
            across, down = w // side + 1, h // side + 1
            window = (frame * down + row // side) * across + col // side
            # windows one after the other, raster order inside each
            orders.append(window.argsort(stable=True) + start)
            start += t * h * w
        return torch.cat(orders).argsort().to(device)
