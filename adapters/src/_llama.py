"""What every Llama-shaped decoder (Llama, Mistral, Qwen2, Qwen3, Gemma) has in common."""

from torch import nn

from vtc.adapter import Attention


def decoder_attention(layer: nn.Module) -> Attention:
    """The self-attention of a decoder layer; per-head norms of q and k, where they exist, are included."""
    attention = layer.self_attn
    config = attention.config
    head_dim = attention.head_dim
    return Attention(
        query=getattr(attention, "q_norm", None) or attention.q_proj,
        key=getattr(attention, "k_norm", None) or attention.k_proj,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=attention.scaling,
    )
