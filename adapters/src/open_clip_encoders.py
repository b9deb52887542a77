"""`VisionTransformer` of open_clip (extra `clip`), alone or as `visual` of a CLIP model."""

import functools
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from vtc.adapter import Attention, Halves
from vtc.encoders import ImageEncoder, register_encoder


@register_encoder
def find(module: nn.Module) -> ImageEncoder | str | None:
    """The encoder that `module` is; whoever holds one has imported open_clip."""
    library: Any = sys.modules.get("open_clip.transformer")
    if library is None or not isinstance(module, library.VisionTransformer):
        is_other = type(module).__module__.startswith("open_clip.") and type(module).__name__ == "ModifiedResNet"
        return "a ResNet has no tokens inside" if is_other else None
    model: Any = module
    stack = model.transformer
    known = (library.ResidualAttentionBlock, library.CustomResidualAttentionBlock)
    strange = {type(block).__name__ for block in stack.resblocks if type(block) not in known}
    if strange:
        return f"its blocks are {', '.join(sorted(strange))}, not x + attention(ln_1(x)), then x + mlp(ln_2(x))"
    if not stack.batch_first:
        return "its blocks run with the tokens in front of the batch. Build it with batch_first=True"
    if any(getattr(block.attn, "logit_scale", None) is not None for block in stack.resblocks):
        return "its logits are scaled cosines, which signals of queries and keys do not describe"
    return ImageEncoder(
        name=f"{type(model).__name__} (open_clip)",
        tower=stack,
        blocks=tuple(stack.resblocks),
        halves=_halves,
        attention_of=_attention,
        patches=model.conv1,
        num_prefix=1,
        has_cls=True,
        checkpoints=functools.partial(getattr, stack, "grad_checkpointing"),
        masks=("attn_mask",),
        bypasses=("forward_intermediates",),
    )


def _halves(block: Any) -> Halves:
    if isinstance(block.attn, nn.MultiheadAttention):
        # its attn_mask would have to be repeated for every head
        return Halves(block.attn, block.mlp, mask="key_padding_mask")
    return Halves(block.attn, block.mlp, returns_tuple=False, mask="attn_mask")


def _attention(block: Any) -> Attention:
    attention = block.attn
    is_torch = isinstance(attention, nn.MultiheadAttention)
    return Attention(
        query=attention if is_torch else attention.ln_q,  # identities where there is no norm
        key=attention if is_torch else attention.ln_k,
        num_heads=attention.num_heads,
        num_key_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        output=attention.out_proj,
        heads_first=not is_torch,
        project=functools.partial(_project, attention) if is_torch else None,
    )


def _project(attention: nn.MultiheadAttention, part: int, x: Tensor) -> Tensor:
    """Queries (0) or keys (1) [B, L, H*d]: torch makes them inside one function, so they are made once more."""
    rows = slice(part * attention.embed_dim, (part + 1) * attention.embed_dim)
    bias = attention.in_proj_bias
    return linear(x, attention.in_proj_weight[rows], None if bias is None else bias[rows])
