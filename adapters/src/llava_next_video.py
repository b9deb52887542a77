"""LLaVA-NeXT-Video: images as LLaVA-NeXT; frames of a video pooled 2x2 before the projector, without newlines."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Encoder, Packing, register_adapter
from vtc.adapters._layout import clip_shape
from vtc.adapters.llava_next import LlavaNextAdapter
from vtc.tokens import Layout


@register_adapter
class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`."""

    family = "llava_next_video"
    model_types = ("llava_next_video",)
    checkpoints = ("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf")

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        video = replace(
            self.image_encoder,
            modality="video",
            method="get_video_features",
            placeholder_id=self.model.config.video_token_id,
            pool=self._pool_frames,
            resize="its resampler pools a fixed grid",
        )
        return self.image_encoder, video

    def packing(self, encoder: Encoder, arguments: Mapping[str, Any]) -> Packing | None:
        if encoder.modality == "image":
            return super().packing(encoder, arguments)
        videos, frames = clip_shape(arguments)
        side = self.side // self.model.config.spatial_pool_stride
        return frame_packing(videos, frames, Layout.grid(side, side, videos, frames))

    def _pool_frames(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The resampler's own pooling; the mean where that is a learned convolution."""
        pool = self.inner.vision_resampler.pool
        if isinstance(pool, nn.Conv2d):
            pool = nn.AvgPool2d(pool.kernel_size, pool.stride)  # type: ignore[arg-type]
        spatial = signal.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        pooled: Tensor = pool(spatial)
        return pooled.flatten(2).transpose(1, 2)


def frame_packing(videos: int, frames: int, layout: Layout) -> Packing:
    """Frames as groups whose tokens follow each other without separators."""
    tokens = layout.row.shape[1]
    slot = torch.arange(tokens).view(frames, -1).repeat(videos, 1)
    return Packing(slot, tuple(v for v in range(videos) for _ in range(frames)), (tokens,) * videos, layout)
