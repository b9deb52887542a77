"""LLaVA-1.5: one image of a fixed grid per placeholder run, a CLIP (or SigLIP) tower, a Llama-shaped LLM."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.adapter import Adapter, Attention, Encoder, register_adapter
from vtc.adapters._llama import decoder_attention
from vtc.adapters._vit import feature_layer, has_cls, tower_attention, tower_layers
from vtc.tokens import Layout


@register_adapter
class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP- or SigLIP-shaped tower."""

    family = "llava"
    model_types = ("llava",)
    checkpoints = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

    @property
    def inner(self) -> nn.Module:
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        return self.inner.language_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.language_model.layers

    def layer_attention(self, index: int) -> Attention:
        return decoder_attention(self.layers[index])

    @property
    def final_norm(self) -> nn.Module:
        return self.language_model.norm

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        config, tower = self.model.config, self.inner.vision_tower
        layers = tower_layers(tower)
        indices = config.vision_feature_layer
        chosen = tuple(feature_layer(layers, i) for i in ([indices] if isinstance(indices, int) else indices))
        return (
            Encoder(
                modality="image",
                method="get_image_features",
                placeholder_id=config.image_token_id,
                tower=tower,
                features=self.inner.multi_modal_projector,
                feature_layers=chosen,
                attention=tower_attention(chosen[-1]),
                num_prefix=int(has_cls(tower)),
                drops_prefix=config.vision_feature_select_strategy == "default",
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = output.pooler_output
        lengths = tuple(len(image) for image in features)
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        layout = Layout.grid(side, side, groups=len(lengths), device=features[0].device)
        extra = max(lengths) - side * side  # a [CLS] that the "full" strategy leaves in front
        if extra:
            parts = (nn.functional.pad(part, (extra, 0), value=-1) for part in (layout.row, layout.col, layout.segment))
            layout = Layout(*parts, grids=layout.grids)
        return lengths, layout

    def unavailable(self, signal: str, site: str) -> str | None:
        encoder = self.encoders[0]
        if signal in ("cls_attention", "cls_hidden") and not encoder.num_prefix:
            return f"its tower {type(encoder.tower).__name__} has no [CLS] token"
        if signal == "cls_hidden" and not encoder.drops_prefix:
            return "vision_feature_select_strategy='full' already keeps [CLS] among the features"
        return None
