"""Signals out of the vision tower: attention rows and sums, keys, queries and hidden states of its blocks.

Queries and keys are captured before RoPE and rotated here; only what is asked for is computed, and what a block gave is
let go when the block is done unless a stage reads it as it is.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Encoder
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.host.rotary import rotate
from vtc.engine.vision.call import EncodeState, state_of
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import attention_rows, received_attention
from vtc.stages import Signal

#: what each signal is made of
MADE_OF = {
    "cls_attention": ("query", "key"),
    "cls_attention_layers": ("query", "key"),
    "cls_logits": ("query", "key"),
    "cls_query": ("query",),
    "keys": ("key",),
    "low_keys": ("key",),
    "received_attention": ("query", "key"),
}


def capture(encoder: Encoder, wanted: Iterable[Signal], undo: Undo) -> None:
    """Hook the modules that the signals `wanted` are made of; those that the encoder lacks are left to the stage."""
    wanted = [s for s in wanted if encoder.lacks(s.name, s.layer) is None]
    needs: dict[int, set[str]] = {}
    for one in wanted:
        for block in blocks_of(encoder, one):
            needs.setdefault(block, set()).update(MADE_OF.get(one.name, ()))
    for block, needed in sorted(needs.items()):
        attention, module = encoder.block_attention(block), _module(encoder, block)
        if "query" in needed:
            undo.after(attention.query, _record(encoder, f"query{block}"))
        if "key" in needed:
            undo.after(attention.key, _record(encoder, f"key{block}"))
            if encoder.rotary or encoder.segments is not None:
                hook = functools.partial(_record_arguments, encoder, block)
                undo.before(module, hook, with_kwargs=True)
    kept = {
        f"{part}{block}"
        for one in wanted
        if one.name != "cls_attention_layers"
        for block in blocks_of(encoder, one)
        for part in MADE_OF.get(one.name, ())
    }
    if any(one.name == "cls_attention_layers" for one in wanted):
        for block in range(encoder.depth + 1):
            hook = functools.partial(_finish_block, encoder, block, kept)
            undo.after(_module(encoder, block), hook)
    if any(one.name == "cls_hidden" for one in wanted):
        for i, layer in enumerate(encoder.feature_layers):
            undo.after(layer, _record(encoder, f"hidden{i}"))


def blocks_of(encoder: Encoder, wanted: Signal) -> tuple[int, ...]:
    """The tower blocks that a signal is made of."""
    if wanted.name not in MADE_OF:
        return ()
    if wanted.name == "cls_attention_layers":
        return tuple(range(encoder.depth + 1))
    return (wanted.layer if wanted.name == "low_keys" else encoder.depth + wanted.layer,)


def signal(state: EncodeState, wanted: Signal) -> Tensor | None:
    """A signal of the host's groups, their tokens in the last axis but for widths; None: it is none of the tower's."""
    if wanted.name not in MADE_OF:
        return None
    encoder = state.encoder
    skip = encoder.num_prefix if encoder.drops_prefix else 0
    blocks = blocks_of(encoder, wanted)
    block = blocks[-1]
    if wanted.name == "cls_attention_layers":
        value = torch.stack([_captured(state, f"cls{b}", b) for b in blocks], dim=1)[:, :, skip:]
    elif wanted.name in ("cls_attention", "cls_logits"):
        value = _cls_row(state, block, softmax=wanted.name == "cls_attention")[:, skip:]
    elif wanted.name == "cls_query":
        return encoder.block_attention(block).split_queries(_captured(state, f"query{block}", block))[:, :, 0]
    elif wanted.name == "received_attention":
        queries, keys = heads(state, "query", block), heads(state, "key", block)
        segments = encoder.segments(state.blocks[block]) if encoder.segments is not None else None
        scale = encoder.block_attention(block).scale
        value = received_attention(queries, keys, segments=segments, scale=scale)[:, skip:]
    else:
        value = heads(state, "key", block)[:, :, skip:]
    return _pooled(value, state)


def heads(state: EncodeState, name: str, block: int) -> Tensor:
    """Queries or keys [T, H, N, d] of a tower block, prefix included, rotated where the tower rotates them."""
    attention = state.encoder.block_attention(block)
    split = attention.split_queries if name == "query" else attention.split_keys
    parts = split(_captured(state, f"{name}{block}", block))
    if not state.encoder.rotary:
        return parts
    cos, sin = (part[None].float() for part in state.blocks[block][names.POSITION_EMBEDDINGS])
    return rotate(parts.float(), cos, sin)


def prefix_keys(state: EncodeState, layer: int) -> Tensor:
    """Keys [T, H, P, d] of the tokens that the host takes off, at the block `layer` after the feature layer."""
    encoder = state.encoder
    skip = encoder.num_prefix if encoder.drops_prefix else 0
    return heads(state, "key", encoder.depth + layer)[:, :, :skip]


def _cls_row(state: EncodeState, block: int, softmax: bool = True) -> Tensor:
    """What [CLS] gives every token of its group, prefix included, mean over heads, [T, N]."""
    attention = state.encoder.block_attention(block)
    row = attention.split_queries(_captured(state, f"query{block}", block)[:, :1])
    keys = heads(state, "key", block)
    return attention_rows(row, keys, scale=attention.scale, softmax=softmax)[:, 0]


def _captured(state: EncodeState, name: str, block: int) -> Tensor:
    if name not in state.captured:
        raise UnsupportedFeatureError(
            f"the vision tower did not run its block {block}, which a stage reads. This version of transformers stops "
            "at the feature layer; use layer=0 of the method, or another version."
        )
    value = state.captured[name]
    if state.passage is None or name.startswith("cls"):
        return value
    # behind a tower[i] stage every patch has the query and key of the token it went into
    expanded: Tensor = state.passage.expand(value, block - 1)
    return expanded


def _pooled(value: Tensor, state: EncodeState) -> Tensor:
    """A signal ([T, N], [T, L, N] or [T, H, N, d]) of the tower's patches as one of the tokens at `tower_out`."""
    pool = state.encoder.pool
    if pool is None:
        return value
    if value.dim() == 2:
        return pool(value[..., None], state.arguments)[..., 0]
    if value.dim() == 3:
        return pool(value.transpose(1, 2), state.arguments).transpose(1, 2)
    number = value.shape[1]
    pooled = pool(value.transpose(1, 2).flatten(2).float(), state.arguments)
    return pooled.unflatten(2, (number, -1)).transpose(1, 2)


def _module(encoder: Encoder, block: int) -> nn.Module:
    return encoder.blocks[block] if encoder.blocks else encoder.signal_block


def _record(encoder: Encoder, name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that notes what leaves a module of the running call."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state = state_of(encoder)
        if state is not None:
            state.captured[name] = names.first_of(output)

    return hook


def _record_arguments(encoder: Encoder, block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    state = state_of(encoder)
    if state is not None:
        state.blocks[block] = names.arguments_of(module, args, kwargs)


def _finish_block(encoder: Encoder, block: int, kept: set[str], module: nn.Module, args: Any, output: Any) -> None:
    """Hook of a block: its row of [CLS], instead of queries and keys of every layer at once."""
    state = state_of(encoder)
    if state is None:
        return
    state.captured[f"cls{block}"] = _cls_row(state, block)
    for name in (f"query{block}", f"key{block}"):
        if name not in kept:
            state.captured.pop(name, None)
