"""LLaVA-NeXT: AnyRes. A low-resolution base tile, then a grid of tiles, unpadded, with a newline after each row.

`tower_out` acts on each tile before the projector. Tokens of tiles that the host cuts off as padding are hidden from
the stages. A newline stays exactly if a token of its row stays.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapter import Encoder, Packing, Picture, register_adapter
from vtc.adapters._layout import ragged_layout
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._pictures import split_tiles
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class LlavaNextAdapter(LlamaAdapter):
    """`LlavaNextForConditionalGeneration`."""

    family = "llava_next"
    model_types = ("llava_next",)
    checkpoints: ClassVar[tuple[str, ...]] = (
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-hf/llava-v1.6-mistral-7b-hf",
    )

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        return (self.image_encoder,)

    @property
    def image_encoder(self) -> Encoder:
        """How images are encoded."""
        config = self.model.config
        return vit_encoder(
            self.inner.vision_tower,
            config.image_token_id,
            features=self.inner.multi_modal_projector,
            layer=config.vision_feature_layer,
            drops_prefix=config.vision_feature_select_strategy == "default",
            resize="the processor cuts its images into tiles: hand smaller images to the processor",
        )

    @property
    def side(self) -> int:
        """Patches on each side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def packing(self, encoder: Encoder, arguments: Mapping[str, Any]) -> Packing | None:
        """Found by sending token numbers through the host's own packing, so that unpadding is the host's."""
        sizes = arguments["image_sizes"]
        tiles = self._tiles(sizes)
        area = self.side**2
        numbers = torch.arange(1, sum(tiles) * area + 1, dtype=torch.float64).reshape(sum(tiles), area, 1)
        strategy = self.model.config.vision_feature_select_strategy
        packed, _ = self.inner.pack_image_features(
            list(numbers.split(tiles)), sizes, strategy, image_newline=torch.zeros(1, dtype=torch.float64)
        )
        slot = torch.full((sum(tiles) * area,), -1)
        separator = torch.full_like(slot, -1)
        places, first = [], 0
        for image, count in zip(packed, tiles, strict=True):
            token = image[:, 0].long() - 1
            at = torch.arange(len(token))
            newline = token < 0
            slot[token[~newline]] = at[~newline]
            ends = torch.searchsorted(at[newline], at)  # newlines before each slot
            # the base tile of a tiled image has no newlines of its own
            in_rows = ~newline & (token >= (first + 1) * area if count > 1 else token >= 0)
            separator[token[in_rows]] = at[newline][ends[in_rows]]
            inside, tile = token % area, token // area - first
            parts = (inside // self.side, inside % self.side, tile)
            places.append(tuple(part.masked_fill(newline, -1) for part in parts))
            first += count
        grids = [((self.side, self.side),) * count for count in tiles]
        in_tiles = tuple(
            self._tile_grid(size) if count > 1 else (0, 0) for size, count in zip(sizes, tiles, strict=True)
        )
        return Packing(
            slot.view(-1, area),
            tuple(image for image, count in enumerate(tiles) for _ in range(count)),
            tuple(len(image) for image in packed),
            ragged_layout(places, grids),  # type: ignore[arg-type]
            separator.view(-1, area),
            in_tiles,
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        packing = self.packing(encoder, arguments)
        assert packing is not None
        return packing.lengths, packing.layout.to(names.features_of(output)[0].device)

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        sizes = inputs["image_sizes"]
        parts = split_tiles(pixels, self._tiles(sizes))
        return [
            Picture(tuple(tiles), tiles=self._tile_grid(size), overview=0) if len(tiles) > 1 else Picture(tuple(tiles))
            for tiles, size in zip(parts, sizes, strict=True)
        ]

    def _tile_grid(self, size: Tensor) -> tuple[int, int]:
        """Rows and columns of tiles of an image."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.model.config
        height, width = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return int(height), int(width)

    def _tiles(self, sizes: Tensor) -> list[int]:
        """Tiles of each image, base tile included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in sizes
        ]
