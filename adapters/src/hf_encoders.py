"""CLIP, SigLIP, DINOv2, ViT and DeiT of transformers, alone or inside a model with a head or a text tower."""

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vtc.adapters._vit import halves, has_cls, tower_attention
from vtc.encoders import ImageEncoder, register_encoder
from vtc.engine.host import names

KNOWN = ("clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "siglip_vision_model", "vit")

REFUSED = {
    "beit": "its logits have a bias for each pair of places, which merged tokens do not have",
    "dinov3_vit": "it rotates queries and keys by their place on the image (RoPE), which merged tokens do not have",
    "siglip2_vision_model": "its images are padded to a common number of patches inside the tower, and padding must "
    "not be merged with patches",
}


@register_encoder
def find(module: nn.Module) -> ImageEncoder | str | None:
    """The vision tower that `module` is."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if not isinstance(module, PreTrainedModel) or not hasattr(module, "embeddings"):
        return None
    if kind not in KNOWN:
        return REFUSED.get(str(kind))
    model: Any = module
    stack = getattr(model, "encoder", model)
    blocks = tuple(next(getattr(stack, name) for name in ("layers", "layer") if hasattr(stack, name)))
    if not hasattr(getattr(blocks[0], "self_attn", None) or blocks[0].attention, "q_proj"):
        return "this version of transformers has no separate q_proj and k_proj in it. Upgrade transformers"
    embeddings = model.embeddings
    registers = getattr(embeddings, "register_tokens", None)
    prefix = int(has_cls(model)) + int(hasattr(embeddings, "distillation_token"))
    return ImageEncoder(
        name=f"{type(model).__name__} (transformers)",
        # hidden states are collected where the stack is a model of its own
        tower=stack if isinstance(stack, PreTrainedModel) else model,
        blocks=blocks,
        halves=halves,
        attention_of=tower_attention,
        patches=next(part for part in embeddings.modules() if isinstance(part, nn.Conv2d)),
        num_prefix=prefix + (0 if registers is None else registers.shape[1]),
        has_cls=has_cls(model),
        implementation=functools.partial(_implementation, model),
        checkpoints=functools.partial(names.checkpoints, blocks[0]),
    )


def _implementation(model: Any) -> str:
    return str(names.attention_of(model.config))
