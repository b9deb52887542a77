"""Qwen2-VL: images of any size, 2x2 merger, M-RoPE; each frame attends to itself."""

from vtc.adapter import register_adapter
from vtc.adapters._qwen import QwenAdapter


@register_adapter
class Qwen2VLAdapter(QwenAdapter):
    """`Qwen2VLForConditionalGeneration`."""

    family = "qwen2_vl"
    model_types = ("qwen2_vl",)
    checkpoints = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-72B-Instruct")
