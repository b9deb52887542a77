"""What the Qwen-VL towers have in common: fused qkv, rotary positions, packed images, patches in merge blocks.

Patches come in blocks of merge x merge, each block one token of the LLM, so `tower_out` acts on what leaves the merger.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Attention, Encoder, Picture
from vtc.adapters._layout import ragged_layout, raster
from vtc.adapters._llama import LlamaAdapter
from vtc.engine.host import names
from vtc.errors import InputError
from vtc.tokens import Layout


class QwenAdapter(LlamaAdapter):
    """`visual` and `language_model` of a Qwen-VL model."""

    multimodal_positions = True
    later_pixels_since = "5.23"  # before, the stock model reads new pixels on a cache unlike the same in one turn

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        config = self.model.config
        return (
            self._encoder("image", "get_image_features", config.image_token_id),
            self._encoder("video", "get_video_features", config.video_token_id),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        grids = tuple(((h, w),) * t for t, h, w in self.merged_grids(arguments))
        lengths = tuple(sum(h * w for h, w in image) for image in grids)
        layout = ragged_layout([raster(image) for image in grids], grids, names.features_of(output)[0].device)
        return lengths, layout

    def merged_grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of each image's tokens in the LLM."""
        grid = next(arguments[name] for name in ("image_grid_thw", "video_grid_thw") if name in arguments)
        merge = self.inner.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in grid.tolist()]

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        return [Picture((image[0],)) for image in self._unpatched(pixels, inputs["image_grid_thw"])]

    def video_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        return [Picture(tuple(video), "video", None) for video in self._unpatched(pixels, inputs["video_grid_thw"])]

    def _unpatched(self, pixels: Tensor, grid: Tensor) -> list[Tensor]:
        """Flat patches in merge blocks -> [t, 3, H, W] of each image or video; of frames in one patch, the first."""
        config = self.model.config.vision_config
        depth, patch, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
        lengths = grid.prod(1).tolist()
        if pixels.dim() != 2 or pixels.shape[0] != sum(lengths) or pixels.shape[1] % (depth * patch**2):
            raise InputError(f"pixels of shape {tuple(pixels.shape)} are not the patches of the grids {grid.tolist()}.")
        found = []
        for patches, (t, h, w) in zip(pixels.split(lengths), grid.tolist(), strict=True):
            cells = patches.reshape(t, h // merge, w // merge, merge, merge, -1, depth, patch, patch)[..., 0, :, :]
            # [t, block row, block column, row, column, channel, y, x] -> [t, channel, block row, row, y, ...]
            found.append(cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, -1, h * patch, w * patch))
        return found

    @property
    def signal_block(self) -> Any:
        """The block whose attention gives the signals: the last."""
        return self.inner.visual.blocks[-1]

    def merged_order(self, arguments: Mapping[str, Any], device: torch.device) -> Tensor | None:
        """Where each token of the LLM, in raster order, stands among the tower's merge blocks; None: in this order."""
        return None

    def pool(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Mean over the patches of each merge block: [1, patches, C] -> [images, tokens, C]."""
        block = self.inner.visual.spatial_merge_size**2
        merged = signal[0].unflatten(0, (-1, block)).mean(dim=1)
        order = self.merged_order(arguments, signal.device)
        if order is not None:
            merged = merged[order]
        lengths = [t * h * w for t, h, w in self.merged_grids(arguments)]
        return nn.utils.rnn.pad_sequence(list(merged.split(lengths)), batch_first=True)

    def _encoder(self, modality: str, method: str, placeholder: int) -> Encoder:
        tower = self.inner.visual
        return Encoder(
            modality=modality,
            method=method,
            placeholder_id=placeholder,
            tower=tower,
            features=None,
            feature_layers=(tower.blocks[-1],),
            attention=block_attention(self.signal_block),
            num_prefix=0,
            drops_prefix=True,
            block=self.signal_block,
            rotary=True,
            segments=segments,
            pool=self.pool,
            blocks=tuple(tower.blocks),
            attention_of=block_attention,
            halves="its tower runs all images as one packed sequence, in merge blocks or windows, whose bounds and "
            "rotations would have to be cut with it",
            resize="its grid follows the size of the image: set the processor's max_pixels instead",
        )


def block_attention(block: Any) -> Attention:
    """The self-attention of a block, whose one projection makes queries, keys and values."""
    attention = block.attn
    return Attention(
        query=attention.qkv,
        key=attention.qkv,
        num_heads=attention.num_heads,
        num_key_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        output=attention.proj,
        fused=True,
    )


def segments(arguments: Mapping[str, Any]) -> Tensor:
    """The segment of each patch, [1, patches], from the block's `cu_seqlens`: frames, or windows."""
    ends = arguments["cu_seqlens"].long()
    numbers = torch.arange(len(ends) - 1, device=ends.device)
    return torch.repeat_interleave(numbers, ends.diff())[None]
