"""LLaVA-1.5: one image of a fixed grid per placeholder run, a CLIP (or SigLIP) tower, a Llama-shaped LLM."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.adapter import Encoder, register_adapter
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class LlavaAdapter(LlamaAdapter):
    """`LlavaForConditionalGeneration` with a CLIP- or SigLIP-shaped tower."""

    family = "llava"
    model_types = ("llava",)
    checkpoints = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

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
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = names.features_of(output)
        lengths = tuple(len(image) for image in features)
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        layout = Layout.grid(side, side, groups=len(lengths), device=features[0].device)
        extra = max(lengths) - side * side  # a [CLS] that the "full" strategy leaves in front
        if extra:
            layout = layout.map(lambda part: nn.functional.pad(part, (extra, 0), value=-1))
        return lengths, layout
