"""What Hugging Face CLIP, SigLIP and similar towers have in common."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtc.adapter import Attention, Encoder, Halves, Resize
from vtc.errors import UnsupportedModelError


def vit_encoder(
    tower: Any,
    placeholder_id: int,
    *,
    features: nn.Module | None,
    layer: int | Sequence[int] = -1,
    drops_prefix: bool = True,
    resize: Resize | str | None = None,
    modality: str = "image",
    **options: Any,
) -> Encoder:
    """The encoder of a CLIP- or SigLIP-shaped tower whose hidden states at `layer` become features.

    `resize` None: patches become tokens one by one. `options` are further fields of `Encoder`, which describes all.

    Raises:
        UnsupportedModelError: the tower is of another shape, or has no such layer.
    """
    chosen, has_prefix = feature_layers(tower, layer), has_cls(tower)
    return Encoder(
        modality=modality,
        method=f"get_{modality}_features",
        placeholder_id=placeholder_id,
        tower=tower,
        features=features,
        feature_layers=chosen,
        attention=tower_attention(chosen[-1]),
        num_prefix=int(has_prefix),
        drops_prefix=drops_prefix,
        blocks=tuple(tower_layers(tower)),
        attention_of=tower_attention,
        halves=halves,
        resize=_interpolated(tower, has_prefix and not drops_prefix) if resize is None else resize,
        **options,
    )


def tower_layers(tower: Any) -> nn.ModuleList:
    """The blocks of a CLIP- or SigLIP-shaped tower.

    Raises:
        UnsupportedModelError: the tower has no `encoder.layers` (or `encoder.layer`) of separate q, k, v projections.
    """
    encoder = getattr(tower, "encoder", None)
    layers: nn.ModuleList | None = getattr(encoder, "layers", getattr(encoder, "layer", None))
    if layers is None or not hasattr(tower, "embeddings") or not hasattr(_attention(layers[0]), "q_proj"):
        raise UnsupportedModelError(
            f"vision tower {type(tower).__name__} is neither CLIP- nor SigLIP-shaped; this family's adapter reads "
            "encoder.layers[i].self_attn.{q,k}_proj. Only sites in the LLM could work; no adapter offers that yet."
        )
    return layers


def tower_attention(layer: Any) -> Attention:
    """The self-attention of a block; norms of q and k, where they exist, are included."""
    attention = _attention(layer)
    heads = _first(attention, "num_heads", "num_attention_heads")
    return Attention(
        query=getattr(attention, "q_norm", None) or attention.q_proj,
        key=getattr(attention, "k_norm", None) or attention.k_proj,
        num_heads=heads,
        num_key_heads=heads,
        head_dim=attention.head_dim,
        scale=_first(attention, "scale", "scaling"),
        output=_first(attention, "out_proj", "o_proj", "projection_layer"),
    )


def halves(layer: Any) -> Halves:
    """The attention and the MLP of a block."""
    return Halves(_attention(layer), layer.mlp)


def has_cls(tower: Any) -> bool:
    """Whether the tower puts a [CLS] token in front of its patches."""
    return hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token")


def feature_layer(layers: nn.ModuleList, index: int) -> nn.Module:
    """The block whose output is `hidden_states[index]` (index 0 is the embedding, -1 the last block)."""
    position = index if index >= 0 else len(layers) + 1 + index
    if not 1 <= position <= len(layers):
        raise UnsupportedModelError(
            f"vision_feature_layer={index} is the tower's embedding or outside its {len(layers)} blocks; "
            "a block's output is needed."
        )
    return layers[position - 1]


def feature_layers(tower: Any, indices: int | Sequence[int]) -> tuple[nn.Module, ...]:
    """The blocks that `vision_feature_layer` names."""
    layers = tower_layers(tower)
    return tuple(feature_layer(layers, i) for i in ([indices] if isinstance(indices, int) else indices))


def _interpolated(tower: Any, keeps_prefix: bool) -> Resize | str:
    """How a tower whose patches become tokens one by one runs on a smaller image."""
    if keeps_prefix:
        return "[CLS] stays among its tokens, so that they are no grid"
    return Resize(tower.config.patch_size)


def _attention(layer: Any) -> Any:
    return getattr(layer, "self_attn", None) or layer.attention


def _first(module: Any, *names: str) -> Any:
    """The first of these attributes that exists."""
    return getattr(module, next(name for name in names if hasattr(module, name)))
