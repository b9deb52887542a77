"""Qwen3-VL: DeepStack (features of earlier tower blocks, added after the first decoder layers), interleaved M-RoPE.

Each frame of a video stands by itself in the prompt, behind its timestamp; a video is still one group of tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vtc.adapter import register_adapter
from vtc.adapters._qwen import QwenAdapter

#: arguments of the language model: bool [B, S], where visual tokens are; a list of [visual tokens, D], a level each
WHERE, FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


@register_adapter
class Qwen3VLAdapter(QwenAdapter):
    """`Qwen3VLForConditionalGeneration`."""

    family = "qwen3_vl"
    model_types = ("qwen3_vl",)
    checkpoints = ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    words = {"language model": (WHERE, FEATURES)}

    @property
    def lowest_layer(self) -> tuple[int, str]:
        count = len(self.inner.visual.deepstack_visual_indexes)
        return count, f"this model adds DeepStack features to all visual tokens after each of its first {count} layers"

    def cut_visual(self, kwargs: Mapping[str, Any], cut: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        where, features = kwargs.get(WHERE), kwargs.get(FEATURES)
        if where is None or features is None:
            return {}
        kept = cut(where[..., None].float())[..., 0] > 0
        short = []
        for level in features:
            dense = level.new_zeros(*where.shape, level.shape[-1])
            dense[where] = level
            short.append(cut(dense)[kept])
        return {WHERE: kept, FEATURES: short}
