"""Video-LLaVA: two CLIP towers, one for images and one for frames; frames keep their [CLS] among the tokens."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtc.adapter import Encoder, Packing, Picture, register_adapter
from vtc.adapters._layout import clip_shape
from vtc.adapters._llama import LlamaAdapter
from vtc.adapters._vit import vit_encoder
from vtc.adapters.llava_next_video import frame_packing
from vtc.engine.host import names
from vtc.tokens import Layout


@register_adapter
class VideoLlavaAdapter(LlamaAdapter):
    """`VideoLlavaForConditionalGeneration`."""

    family = "video_llava"
    model_types = ("video_llava",)
    checkpoints = ("LanguageBind/Video-LLaVA-7B-hf",)

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        config = self.model.config
        default = config.vision_feature_select_strategy == "default"
        return (
            self._encoder("image", self.inner.image_tower, config.image_token_id, default),
            # the host never takes [CLS] off frames
            self._encoder("video", self.inner.video_tower, config.video_token_id, False),
        )

    def packing(self, encoder: Encoder, arguments: Mapping[str, Any]) -> Packing | None:
        if encoder.modality == "image":
            return None
        videos, frames = clip_shape(arguments)

        def with_cls(part: Tensor) -> Tensor:
            return nn.functional.pad(part.unflatten(1, (frames, -1)), (encoder.num_prefix, 0), value=-1).flatten(1)

        return frame_packing(videos, frames, Layout.grid(self._side, self._side, videos, frames).map(with_cls))

    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        features = names.features_of(output)
        packing = self.packing(encoder, arguments)
        if packing is not None:
            return packing.lengths, packing.layout.to(features.device)
        grid = Layout.grid(self._side, self._side, features.shape[0], device=features.device)
        extra = features.shape[1] - self._side**2
        layout = grid.map(lambda part: nn.functional.pad(part, (extra, 0), value=-1))
        return (features.shape[1],) * features.shape[0], layout

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Picture, ...]:
        return super().pictures({names.PIXELS: inputs.get(names.IMAGE_PIXELS), **inputs})

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _encoder(self, modality: str, tower: nn.Module, placeholder: int, drops_prefix: bool) -> Encoder:
        return vit_encoder(
            tower,
            placeholder,
            features=self.inner.multi_modal_projector,
            layer=self.model.config.vision_feature_layer,
            drops_prefix=drops_prefix,
            modality=modality,
        )
