"""What Idefics3 and SmolVLM have in common: SigLIP-like tower, pixel shuffle connector, tiles wrapped in text.

The encoder gets the tiles of each prompt without knowing to which image they belong, so a tile is what budgets per
image count. `tower_out` acts between the pixel shuffle and the projection.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtc.adapter import Encoder, Picture
from vtc.adapters._layout import block_mean
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._pictures import check, runs, split_tiles, with_overview
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


class IdeficsAdapter(LlamaAdapter):
    """`vision_model`, `connector` and `text_model`."""

    @property
    def language_model(self) -> Any:
        return self.inner.text_model

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        return (
            vit_encoder(
                self.inner.vision_model,
                self.model.config.image_token_id,
                features=self.inner.connector.modality_projection,
                segments=unpadded,
                pool=self._shuffle,
                resize="the processor cuts its images into tiles of fixed size: hand smaller images to the processor",
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        prompts = names.features_of(output)
        count = self.inner.image_seq_len
        tiles = sum(len(prompt) for prompt in prompts) // count
        side = round(count**0.5)
        return (count,) * tiles, Layout.grid(side, side, groups=tiles, device=prompts[0].device)

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        check(pixels, 5, "[prompts, tiles, 3, height, width]")
        tiles = pixels.flatten(0, 1)
        tiles = tiles[tiles.flatten(1).any(1)]  # blank ones fill prompts with fewer tiles up, and the host skips them
        ids = inputs[names.INPUT_IDS]
        counts = []
        for row, prompt in zip(ids.tolist(), runs(ids == self.model.config.image_token_id), strict=True):
            # each tile stands behind the mark of its place, and the last of an image behind that of the whole
            marks = [row[start - 1] for start, _ in prompt]
            ends = [i + 1 for i, mark in enumerate(marks) if mark == marks[-1]]
            counts += [end - start for start, end in itertools.pairwise([0, *ends])]
        return [with_overview(image) for image in split_tiles(tiles, counts)]

    def _shuffle(self, signal: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Mean over the patches that pixel shuffle puts into one token."""
        return block_mean(signal, round(signal.shape[1] ** 0.5), self.inner.connector.scale_factor)


def unpadded(arguments: Mapping[str, Any]) -> Tensor | None:
    """0 for patches of the image, -1 for patches of its padding, [tiles, patches]; None where there is no padding."""
    mask = arguments.get(names.ATTENTION_MASK)
    if mask is None:
        return None
    seen = mask[:, 0, 0] if mask.dim() == 4 else mask
    seen = seen == 0 if seen.is_floating_point() else seen.bool()
    return torch.where(seen, 0, -1)
