"""FLOPs by formula (2 x multiply-accumulates), aware of grouped keys and gated MLPs.

One decoder layer with n query tokens, m keys, width D, H heads of d, G key heads, MLP width I and g MLP matrices
(3 gated, 2 plain):

    2 n D H d  +  2 * 2 n D G d  +  2 n H d D   projections q, k, v, o
    + 4 n m H d                                 q k^T and its product with v
    + 2 g n D I                                 MLP

Norms, rotary embeddings and softmax are not counted. The causal half of q k^T is counted in full, as dense kernels
and `torch.utils.flop_counter` do.
"""

from collections.abc import Sequence
from typing import Any


def decoder_layer(config: Any, queries: int, keys: int | None = None) -> int:
    """FLOPs of one decoder layer of a Llama-shaped LLM.

    Example:
        >>> from types import SimpleNamespace
        >>> vicuna = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        >>> round(32 * decoder_layer(vicuna, 636) / 1e12, 4)
        8.4496
    """
    keys = queries if keys is None else keys
    width, heads = config.hidden_size, config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    projections = 2 * queries * width * head * (2 * heads + 2 * key_heads)
    attention = 4 * queries * keys * heads * head
    return projections + attention + 6 * queries * width * config.intermediate_size


def llm_prefill(config: Any, lengths: Sequence[int], logits: int = 1) -> int:
    """FLOPs of a prefill in which layer l sees `lengths[l]` tokens, with the LM head on `logits` positions."""
    return sum(decoder_layer(config, n) for n in lengths) + 2 * logits * config.hidden_size * config.vocab_size


def vision_tower(config: Any, tokens: int, layers: int | None = None) -> int:
    """FLOPs of a ViT over `tokens` tokens ([CLS] included), patch embedding included."""
    count = config.num_hidden_layers if layers is None else layers
    width = config.hidden_size
    layer = 8 * tokens * width * width + 4 * tokens * tokens * width + 4 * tokens * width * config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    return count * layer + 2 * patches * width * getattr(config, "num_channels", 3) * config.patch_size**2


def kv_bytes(config: Any, lengths: Sequence[int], element_size: int) -> int:
    """Bytes of keys and values when layer l holds `lengths[l]` entries."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return sum(2 * n * key_heads * head * element_size for n in lengths)
