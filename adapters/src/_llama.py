"""What every Llama-shaped decoder (Llama, Mistral, Qwen2, Qwen3, Gemma) has in common."""

from typing import Any

from torch import nn

from vtc.adapter import Adapter, Attention


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

    @property
    def final_norm(self) -> nn.Module:
        norm: nn.Module = self.language_model.norm
        return norm
