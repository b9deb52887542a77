"""Model families and encoders by themselves: one file each. Importing this package registers them all."""

from vtc.adapters import hf_encoders, open_clip_encoders, timm_encoders
from vtc.adapters.gemma3 import Gemma3Adapter
from vtc.adapters.idefics3 import Idefics3Adapter
from vtc.adapters.internvl import InternVLAdapter
from vtc.adapters.llava import LlavaAdapter
from vtc.adapters.llava_next import LlavaNextAdapter
from vtc.adapters.llava_next_video import LlavaNextVideoAdapter
from vtc.adapters.llava_onevision import LlavaOnevisionAdapter
from vtc.adapters.paligemma import PaliGemmaAdapter
from vtc.adapters.qwen2_5_vl import Qwen25VLAdapter
from vtc.adapters.qwen2_vl import Qwen2VLAdapter
from vtc.adapters.qwen3_vl import Qwen3VLAdapter
from vtc.adapters.smolvlm import SmolVLMAdapter
from vtc.adapters.video_llava import VideoLlavaAdapter

__all__ = [
    "Gemma3Adapter",
    "Idefics3Adapter",
    "InternVLAdapter",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaNextVideoAdapter",
    "LlavaOnevisionAdapter",
    "PaliGemmaAdapter",
    "Qwen2VLAdapter",
    "Qwen3VLAdapter",
    "Qwen25VLAdapter",
    "SmolVLMAdapter",
    "VideoLlavaAdapter",
    "hf_encoders",
    "open_clip_encoders",
    "timm_encoders",
]
