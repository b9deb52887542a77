"""Idefics3: see `_idefics`."""

from vtc.adapter import register_adapter
from vtc.adapters._idefics import IdeficsAdapter


@register_adapter
class Idefics3Adapter(IdeficsAdapter):
    """`Idefics3ForConditionalGeneration`."""

    family = "idefics3"
    model_types = ("idefics3",)
    checkpoints = ("HuggingFaceM4/Idefics3-8B-Llama3",)
