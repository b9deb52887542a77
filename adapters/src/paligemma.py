"""PaliGemma 1 and 2: SigLIP patches, one linear projection, a prompt that is bidirectional as a whole."""

import functools
from collections.abc import Mapping
from typing import Any

from vtc.adapter import Encoder, register_adapter
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._vit import vit_encoder
from vtc.engine.host import names
from vtc.signals import SIGNALS
from vtc.tokens import Layout


@register_adapter
class PaliGemmaAdapter(LlamaAdapter):
    """`PaliGemmaForConditionalGeneration`."""

    family = "paligemma"
    model_types = ("paligemma",)
    checkpoints = ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-448", "google/paligemma2-10b-mix-448")
    masks_outside = True
    bidirectional_prompt = True

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        return (
            vit_encoder(
                self.inner.vision_tower,
                self.model.config.image_token_id,
                features=self.inner.multi_modal_projector,
            ),
        )

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = names.features_of(output)
        side = round(features.shape[1] ** 0.5)
        layout = Layout.grid(side, side, groups=features.shape[0], device=features.device)
        return (side * side,) * features.shape[0], layout

    def unavailable(self, signal: str, site: str, layer: int = 0) -> str | None:
        capped = getattr(self.text_config, "attn_logit_softcapping", None)
        if site == "layer" and "logits" in SIGNALS[signal].of and capped is not None:
            return f"its decoder caps attention logits at {capped}, which the recomputed attention does not"
        return super().unavailable(signal, site, layer)
