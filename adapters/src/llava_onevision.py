"""LLaVA-OneVision: AnyRes with a bilinear downscale of large images, several images untiled, pooled video frames.

The host may scale the packed grid, so `tower_out` acts on what leaves the encoder, one group per image or video, and
signals go through the host's own packing. Newlines stay exactly if a token of their row stays; the one newline behind
a video, or behind an untiled image, always stays.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Encoder, Packing, Picture, register_adapter
from vtc.adapters._layout import clip_shape, ragged_layout, raster
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._pictures import mosaic, split_tiles
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class LlavaOnevisionAdapter(LlamaAdapter):
    """`LlavaOnevisionForConditionalGeneration`."""

    family = "llava_onevision"
    model_types = ("llava_onevision",)
    checkpoints = ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf")

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        config = self.model.config
        return (
            self._encoder("image", config.image_token_id, self._pool_image),
            self._encoder("video", config.video_token_id, self._pool_video),
        )

    @property
    def side(self) -> int:
        """Patches on each side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def packing(self, encoder: Encoder, arguments: Mapping[str, Any]) -> Packing | None:
        if encoder.modality == "video":
            videos, frames = clip_shape(arguments)
            side = (self.side + 1) // 2
            images = [(((side, side),) * frames, 1, frames * side * side)] * videos
        else:
            images = [self._grids(newlines) for newlines in self._newlines(arguments)]
        places, slots, separators = [], [], []
        for grids, rows, tail in images:
            token, separator, place = _with_newlines(grids, rows, tail)
            slots.append(token)
            separators.append(separator)
            places.append(place)

        def pad(parts: list[Tensor]) -> Tensor:
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)

        return Packing(
            pad(slots),
            tuple(range(len(images))),
            tuple(len(slot) for slot in slots),
            ragged_layout(places, [grids for grids, _, _ in images]),
            pad(separators),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        packing = self.packing(encoder, arguments)
        assert packing is not None
        return packing.lengths, packing.layout.to(names.features_of(output)[0].device)

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        parts = split_tiles(pixels, self._tiles(inputs))
        return [
            Picture((tiles[0], self._joined(tiles[1:], size)), overview=0) if len(tiles) > 1 else Picture((tiles[0],))
            for tiles, size in zip(parts, inputs["image_sizes"], strict=True)
        ]

    def _joined(self, tiles: Tensor, size: Tensor) -> Tensor:
        """The tiles of an image as one picture, without the padding that the host cuts off its grid of patches."""
        from transformers.models.llava_onevision import modeling_llava_onevision as host

        config, vision = self.model.config, self.model.config.vision_config
        rows, columns = host.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        height, width, patch = rows * self.side, columns * self.side, vision.patch_size
        seen = host.unpad_image(torch.arange(height * width).view(1, height, width), size)[0]
        (top, left), (bottom, right) = (divmod(int(corner), width) for corner in (seen[0, 0], seen[-1, -1]))
        return mosaic(tiles, rows)[:, top * patch : (bottom + 1) * patch, left * patch : (right + 1) * patch]

    def _grids(self, is_newline: Tensor) -> tuple[tuple[tuple[int, int], ...], int, int]:
        """Segments of an image (base tile, then the grid as packed), its newlines, and the tokens that they divide."""
        base, rows = (self.side, self.side), int(is_newline.sum())
        rest = len(is_newline) - self.side**2 - rows
        return ((base, (rows, rest // rows)), rows, rest) if rest else ((base,), 1, self.side**2)

    def _newlines(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Which slots of each image are newlines, found by sending marks through the host's own packing."""
        blank = torch.zeros(sum(self._tiles(arguments)), self.side**2, 1)
        return [image[:, 0] > 0 for image in self._packed(blank, arguments, torch.ones(1))]

    def _packed(self, signal: Tensor, arguments: Mapping[str, Any], newline: Tensor) -> list[Tensor]:
        """[tiles, patches, C] as the host packs features: [slots, C] for each image."""
        ratio = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        parts = list(signal.split(self._tiles(arguments)))
        packed, _ = self.inner.pack_image_features(
            parts, arguments["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio
        )
        return list(packed)

    def _pool_image(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        signal = signal.float()
        packed = self._packed(signal, arguments, signal.new_zeros(signal.shape[2]))
        return nn.utils.rnn.pad_sequence(packed, batch_first=True)

    def _pool_video(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        videos, _ = clip_shape(arguments)
        pooled = self.inner.apply_pooling(signal.float())
        return nn.functional.pad(pooled.reshape(videos, -1, pooled.shape[-1]), (0, 0, 0, 1))

    def _tiles(self, arguments: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, base tile included; images of prompts with several images are not tiled."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        config, sizes, numbers = self.model.config, arguments["image_sizes"], arguments.get("batch_num_images")
        alone = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        size = config.vision_config.image_size
        return [
            image_size_to_num_patches(one, config.image_grid_pinpoints, size) if tiled else 1
            for one, tiled in zip(sizes, alone, strict=True)
        ]

    def _encoder(self, modality: str, placeholder: int, pool: Any) -> Encoder:
        config = self.model.config
        return vit_encoder(
            self.inner.vision_tower,
            placeholder,
            features=None,
            layer=config.vision_feature_layer,
            drops_prefix=config.vision_feature_select_strategy == "default",
            modality=modality,
            pool=pool,
            joins_tiles=modality == "image",
            resize="the processor cuts its images into tiles: hand smaller images to the processor",
        )


def _with_newlines(
    grids: tuple[tuple[int, int], ...], rows: int, tail: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Slots, separators and places of raster grids whose last `tail` tokens are `rows` rows that end in a newline."""
    row, col, segment = raster(grids)
    head = len(row) - tail
    length = len(row) + rows
    step = tail // rows + 1
    place = torch.arange(length)
    newline = (place >= head) & ((place - head) % step == step - 1)
    parts = []
    for part in (row, col, segment):
        whole = torch.full((length,), -1)
        whole[~newline] = part
        parts.append(whole)
    ends = head + (place - head).div(step, rounding_mode="floor") * step + step - 1
    separator = torch.where(newline | (place < head), -1, ends)
    return torch.where(newline, -1, place), separator, (parts[0], parts[1], parts[2])
