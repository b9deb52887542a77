"""What Hugging Face CLIP and SigLIP towers have in common."""

from torch import nn

from vtc.adapter import Attention
from vtc.errors import UnsupportedModelError


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    """The blocks of a CLIP- or SigLIP-shaped tower.

    Raises:
        UnsupportedModelError: the tower has no `encoder.layers` of separate q, k, v projections.
    """
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if layers is None or not hasattr(layers[0].self_attn, "q_proj") or not hasattr(tower, "embeddings"):
        raise UnsupportedModelError(
            f"vision tower {type(tower).__name__} is neither CLIP- nor SigLIP-shaped; this family's adapter reads "
            "encoder.layers[i].self_attn.{q,k}_proj. Only sites in the LLM could work; no adapter offers that yet."
        )
    return layers


def tower_attention(layer: nn.Module) -> Attention:
    """The self-attention of a CLIP or SigLIP block."""
    attention = layer.self_attn
    return Attention(
        query=attention.q_proj,
        key=attention.k_proj,
        num_heads=attention.num_heads,
        num_key_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
    )


def has_cls(tower: nn.Module) -> bool:
    """Whether the tower puts a [CLS] token in front of its patches."""
    return hasattr(tower.embeddings, "class_embedding")


def feature_layer(layers: nn.ModuleList, index: int) -> nn.Module:
    """The block whose output is `hidden_states[index]` (index 0 is the embedding, -1 the last block)."""
    position = index if index >= 0 else len(layers) + 1 + index
    if not 1 <= position <= len(layers):
        raise UnsupportedModelError(
            f"vision_feature_layer={index} is the tower's embedding or outside its {len(layers)} blocks; "
            "a block's output is needed."
        )
    return layers[position - 1]
