"""InternVL (the `-HF` checkpoints): tiles of 448 pixels, pixel shuffle 2x2 -> 1, tiles of an image in one run.

The encoder gets tiles without knowing to which image they belong, so a tile is what budgets per image count.
`tower_out` acts between the pixel shuffle and the projector.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtc.adapter import Encoder, Picture, Resize, register_adapter
from vtc.adapters._layout import block_mean
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._pictures import runs, split_tiles, with_overview
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class InternVLAdapter(LlamaAdapter):
    """`InternVLForConditionalGeneration`."""

    family = "internvl"
    model_types = ("internvl",)
    checkpoints = ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF")

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        config = self.model.config
        return (
            vit_encoder(
                self.inner.vision_tower,
                config.image_token_id,
                features=self.inner.multi_modal_projector,
                layer=config.vision_feature_layer,
                drops_prefix=config.vision_feature_select_strategy == "default",
                pool=self._shuffle,
                resize=Resize(self._block * config.vision_config.patch_size[0], flag=None, square=True),
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = names.features_of(output)
        side = round(features.shape[1] ** 0.5)
        layout = Layout.grid(side, side, groups=features.shape[0], device=features.device)
        return (features.shape[1],) * features.shape[0], layout

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        config = self.model.config
        patches = pixels.shape[-2] * pixels.shape[-1] // math.prod(config.vision_config.patch_size)
        tokens = patches // self._block**2
        # the tiles of an image stand in one run
        prompts = runs(inputs[names.INPUT_IDS] == config.image_token_id)
        counts = [length // tokens for prompt in prompts for _, length in prompt]
        return [with_overview(tiles) for tiles in split_tiles(pixels, counts)]

    def _shuffle(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Mean over the patches that pixel shuffle puts into one token: 2x2 blocks of the raster grid."""
        return block_mean(signal, round(signal.shape[1] ** 0.5), self._block)

    @property
    def _block(self) -> int:
        """Patches on the side of the block that becomes one token."""
        return round(1 / self.model.config.downsample_ratio)
