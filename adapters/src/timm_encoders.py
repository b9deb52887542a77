"""`VisionTransformer` of timm, alone or inside another model (open_clip's `TimmModel`, transformers' wrapper)."""

import functools
import inspect
import sys
from typing import Any

from torch import nn

from vtc.adapter import Attention, Halves
from vtc.encoders import ImageEncoder, register_encoder


@register_encoder
def find(module: nn.Module) -> ImageEncoder | str | None:
    """The encoder that `module` is; whoever holds one has imported timm."""
    timm: Any = sys.modules.get("timm.models.vision_transformer")
    if timm is None or not isinstance(module, timm.VisionTransformer):
        is_other = type(module).__module__.startswith("timm.models.") and hasattr(module, "patch_embed")
        return "of timm's models only VisionTransformer is known" if is_other and hasattr(module, "blocks") else None
    model: Any = module
    strange = {type(block).__name__ for block in model.blocks if type(block) is not timm.Block}
    if strange:
        return f"its blocks are {', '.join(sorted(strange))}, not x + attention(norm(x)), then x + mlp(norm(x))"
    strange = {type(block.attn).__name__ for block in model.blocks if type(block.attn) is not timm.Attention}
    if strange:
        return f"its attention is {', '.join(sorted(strange))}, whose queries and keys are not those of one softmax"
    if "attn_mask" not in inspect.signature(timm.Attention.forward).parameters:
        return "the attention of this version of timm takes no mask. Use timm>=1.0.17"
    return ImageEncoder(
        name=f"{type(model).__name__} (timm)",
        tower=model,
        blocks=tuple(model.blocks),
        halves=_halves,
        attention_of=_attention,
        patches=next(part for part in model.patch_embed.modules() if isinstance(part, nn.Conv2d)),
        num_prefix=model.num_prefix_tokens,
        has_cls=model.has_class_token,
        entry="forward_features",
        checkpoints=functools.partial(getattr, model, "grad_checkpointing"),
        masks=("attn_mask", "is_causal"),
        bypasses=("forward_intermediates",),
    )


def _halves(block: Any) -> Halves:
    return Halves(block.attn, block.mlp, returns_tuple=False, mask="attn_mask")


def _attention(block: Any) -> Attention:
    attention = block.attn
    return Attention(
        query=attention.q_norm,  # identities where there is no norm
        key=attention.k_norm,
        num_heads=attention.num_heads,
        num_key_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        output=attention.proj,
        heads_first=True,
    )
