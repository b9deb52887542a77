"""SmolVLM: see `_idefics`."""

from vtc.adapter import register_adapter
from vtc.adapters._idefics import IdeficsAdapter


@register_adapter
class SmolVLMAdapter(IdeficsAdapter):
    """`SmolVLMForConditionalGeneration`."""

    family = "smolvlm"
    model_types = ("smolvlm",)
    checkpoints = (
        "HuggingFaceTB/SmolVLM-Instruct",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    )
