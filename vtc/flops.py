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


def decoder_layer(config: Any, queries: int, keys: int | None = None, projected: int | None = None) -> int:
    """FLOPs of one decoder layer of a Llama-shaped LLM.

    Args:
        config: its text config.
        queries: tokens that ask and pass the MLP.
        keys: tokens that they see; None: those that ask.
        projected: tokens whose keys and values are made in this call; None: those that ask.

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
    projections = 4 * width * head * (queries * heads + (queries if projected is None else projected) * key_heads)
    attention = 4 * queries * keys * heads * head
    return projections + attention + 6 * queries * width * config.intermediate_size


def llm_prefill(
    config: Any,
    lengths: Sequence[int],
    logits: int = 1,
    awake: Sequence[int] | None = None,
    attending: Sequence[int] | None = None,
) -> int:
    """FLOPs of a prefill in which layer l sees `lengths[l]` tokens, with the LM head on `logits` positions.

    `awake[l]` of them ask and pass the MLP; None: all (no layer is frozen). Attention repeats them to `attending[l]`
    tokens; None: it does not (no virtual unmerging).
    """
    asking = lengths if awake is None else awake
    layers = sum(decoder_layer(config, q, n, projected=n) for q, n in zip(asking, lengths, strict=True))
    if attending is not None:
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers += sum(4 * (m * m - n * n) * heads * head for n, m in zip(lengths, attending, strict=True))
    return layers + 2 * logits * config.hidden_size * config.vocab_size


def vision_tower(config: Any, tokens: int, layers: int | None = None) -> int:
    """FLOPs of a ViT over `tokens` tokens ([CLS] included), patch embedding included."""
    count = config.num_hidden_layers if layers is None else layers
    width = config.hidden_size
    layer = 8 * tokens * width * width + 4 * tokens * tokens * width + 4 * tokens * width * config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    return count * layer + 2 * patches * width * getattr(config, "num_channels", 3) * config.patch_size**2


def vit_block(entering: int, leaving: int, attention: int, mlp: int, width: int) -> int:
    """FLOPs of a ViT block that drops tokens between its halves.

    Args:
        entering: tokens in its attention.
        leaving: tokens in its MLP.
        attention, mlp: elements of the weight matrices of the two halves.
        width: heads x head size.

    Example:
        >>> vit_b = dict(attention=4 * 768**2, mlp=8 * 768**2, width=768)
        >>> round(12 * vit_block(197, 197, **vit_b) / 1e9, 2)
        34.89
    """
    return 2 * entering * attention + 4 * entering * entering * width + 2 * leaving * mlp


def kv_bytes(config: Any, lengths: Sequence[int], element_size: int) -> int:
    """Bytes of keys and values when layer l holds `lengths[l]` entries."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return sum(2 * n * key_heads * head * element_size for n in lengths)
