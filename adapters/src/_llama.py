"""What every Llama-shaped decoder (Llama, Mistral, Qwen2, Qwen3, Gemma) has in common."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtc.adapter import Adapter, Attention, Picture
from vtc.adapters._pictures import clips, single_images
from vtc.engine.host import names


def decoder_attention(layer: Any, heads_first: bool = False) -> Attention:
    """The self-attention of a decoder layer; per-head norms of q and k, where they exist, are included.

    `heads_first` says that these norms act after the transpose to [B, H, L, d].
    """
    attention = layer.self_attn
    config = attention.config
    return Attention(
        query=getattr(attention, "q_norm", None) or attention.q_proj,
        key=getattr(attention, "k_norm", None) or attention.k_proj,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        output=attention.o_proj,
        heads_first=heads_first,
    )


class LlamaAdapter(Adapter):
    """An inner model whose `language_model` is a Llama-shaped decoder."""

    @property
    def inner(self) -> Any:
        return self.model.base_model  # what `generate` asks for features; the model itself where it has no LM head

    @property
    def language_model(self) -> Any:
        return self.inner.language_model

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.language_model.layers
        return layers

    def layer_attention(self, index: int) -> Attention:
        return decoder_attention(self.layers[index])

    def keys_values(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        keys, values = (
            proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for proj in (attention.k_proj, attention.v_proj)
        )
        norm = getattr(attention, "k_norm", None)  # acts on the last dimension, so also after the transpose
        return (keys if norm is None else norm(keys)), values

    def queries(self, index: int, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[index]
        attention = layer.self_attn
        queries: Tensor = attention.q_proj(layer.input_layernorm(hidden))
        queries = queries.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        norm = getattr(attention, "q_norm", None)  # acts on the last dimension, so also after the transpose
        return queries if norm is None else norm(queries)

    def projections(self, index: int) -> tuple[nn.Module, tuple[nn.Module, ...], nn.Module]:
        layer: Any = self.layers[index]
        attention = layer.self_attn
        return attention, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.language_model.norm
        return norm

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Picture, ...]:
        found = []
        if inputs.get(names.PIXELS) is not None:
            found += self.image_pictures(inputs[names.PIXELS], inputs)
        if inputs.get(names.VIDEO_PIXELS) is not None:
            found += self.video_pictures(inputs[names.VIDEO_PIXELS], inputs)
        return tuple(found)

    def image_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        """The pictures in the pixels of images."""
        return single_images(pixels)

    def video_pictures(self, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Picture]:
        """The pictures in the pixels of videos."""
        return clips(pixels)
