"""Gemma 3: SigLIP averaged to 256 tokens per image, bidirectional image blocks, local and global decoder layers.

The projector averages patches before it projects, so `tower_out` acts on what leaves it.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtc.adapter import Attention, Encoder, register_adapter
from vtc.adapters._layout import block_mean
from vtc.adapters._llama import LlamaAdapter, decoder_attention
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class Gemma3Adapter(LlamaAdapter):
    """`Gemma3ForConditionalGeneration`."""

    family = "gemma3"
    model_types = ("gemma3",)
    checkpoints = ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it")
    masks_outside = True
    later_pixels_since = "5.23"  # before, the stock model reads new pixels on a cache unlike the same in one turn
    renumbers = False  # local and global layers rotate differently

    def layer_attention(self, index: int) -> Attention:
        return decoder_attention(self.layers[index], heads_first=True)

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        return (
            vit_encoder(
                self.inner.vision_tower,
                self.model.config.image_token_id,
                features=None,
                pool=self._average,
                resize="its projector averages a fixed grid of patches",
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = names.features_of(output)
        side = self.inner.multi_modal_projector.tokens_per_side
        layout = Layout.grid(side, side, groups=features.shape[0], device=features.device)
        return (side * side,) * features.shape[0], layout

    def _average(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Mean over the patches that the projector averages into one token."""
        projector = self.inner.multi_modal_projector
        return block_mean(signal, projector.patches_per_image, projector.kernel_size)
