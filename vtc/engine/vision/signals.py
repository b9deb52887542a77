"""Signals out of the vision tower: attention rows and sums, keys, queries and hidden states of its blocks.

Queries and keys are captured before RoPE and rotated here; only what is asked for is computed, and what a block gave is
let go when the block is done unless a stage reads it as it is.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Encoder
from vtc.companion import ClipCompanion
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.host.rotary import rotate
from vtc.engine.readers import Readers
from vtc.engine.vision.call import EncodeState, state_of
from vtc.engine.vision.tiles import Groups, take_signal
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import attention_rows, received_attention
from vtc.signals import SIGNALS
from vtc.stages import Signal
from vtc.tokenmap import TokenMap


def capture(encoder: Encoder, wanted: Iterable[Signal], undo: Undo) -> None:
    """Hook the modules that the signals `wanted` are made of; those that the encoder lacks are left to the stage."""
    wanted = [one for one in wanted if encoder.lacks(one.name, one.layer) is None]
    parts = {part for one in wanted for part in SIGNALS[one.name].of}
    needs: dict[int, set[str]] = {}
    kept: set[str] = set()
    for one in wanted:
        kind = SIGNALS[one.name]
        for block in blocks_of(encoder, one):
            needs.setdefault(block, set()).update(kind.of)
            if kind.block != "every":
                kept.update(f"{part}{block}" for part in kind.of)
    for block, needed in sorted(needs.items()):
        attention, module = encoder.block_attention(block), _module(encoder, block)
        if "query" in needed:
            undo.after(attention.query, _record(encoder, f"query{block}"))
        if "key" in needed:
            undo.after(attention.key, _record(encoder, f"key{block}"))
            if encoder.rotary or encoder.segments is not None:
                hook = functools.partial(_record_arguments, encoder, block)
                undo.before(module, hook, with_kwargs=True)
    if any(SIGNALS[one.name].block == "every" for one in wanted):
        for block in range(encoder.depth + 1):
            hook = functools.partial(_finish_block, encoder, block, kept)
            undo.after(_module(encoder, block), hook)
    if "hidden" in parts:
        for i, layer in enumerate(encoder.feature_layers):
            undo.after(layer, _record(encoder, f"hidden{i}"))
    if "features" in parts:
        assert encoder.features is not None
        undo.before(encoder.features, functools.partial(_record_features, encoder))


def blocks_of(encoder: Encoder, wanted: Signal) -> tuple[int, ...]:
    """The tower blocks that a signal is made of."""
    match SIGNALS[wanted.name].block:
        case "feature":
            return (encoder.depth + wanted.layer,)
        case "first":
            return (wanted.layer,)
        case "every":
            return tuple(range(encoder.depth + 1))
    return ()


@dataclass(frozen=True, eq=False)
class Reading:
    """One signal of an encoder call.

    Args:
        state: the call.
        wanted: the signal.
        groups: whose tokens it is read for; None: the host's groups.
        left: what is left of them; None: everything.
        with_cls: whether [CLS] stands in front of the tokens.
        companion: CLIP's joint space, where the plan has one.
    """

    state: EncodeState
    wanted: Signal
    groups: Groups | None = None
    left: TokenMap | None = None
    with_cls: bool = False
    companion: ClipCompanion | None = None

    @property
    def block(self) -> int:
        """The block, the last one of several, that makes the signal."""
        return blocks_of(self.state.encoder, self.wanted)[-1]

    def tokens(self, value: Tensor) -> Tensor:
        """`value` of all patches, those in front included, for the tokens."""
        skip, axis = _skipped(self.state.encoder), SIGNALS[self.wanted.name].axis
        value = _pooled(value.narrow(axis, skip, value.shape[axis] - skip), self.state)
        if self.groups is not None:
            value = self.groups.take(value)
        return value if self.left is None else take_signal(value, self.left.anchor)

    def of_groups(self, value: Tensor) -> Tensor:
        """`value` of the host's groups as a whole, for these."""
        return value if self.groups is None else value[self.groups.rows]


#: signals of the tokens at `tower_out`, and of those that are carried behind the encoder
READERS: Readers[Callable[[Reading], Tensor]] = Readers()
reads = READERS.reads


def collect(state: EncodeState, groups: Groups, wanted: tuple[Signal, ...], left: TokenMap | None) -> dict[str, Tensor]:
    """The signals that a stage at `tower_out` declares, for what is `left` of `groups`."""
    with_cls = any(one.name == "cls_hidden" for one in wanted)
    return {one.name: READERS[one.name](Reading(state, one, groups, left, with_cls)) for one in wanted}


@reads("cls_attention", "cls_logits")
def _cls(read: Reading) -> Tensor:
    return read.tokens(_cls_row(read.state, read.block, softmax=read.wanted.name == "cls_attention"))


@reads("cls_attention_layers")
def _cls_layers(read: Reading) -> Tensor:
    blocks = blocks_of(read.state.encoder, read.wanted)
    return read.tokens(torch.stack([_captured(read.state, f"cls{block}", block) for block in blocks], dim=1))


@reads("cls_query")
def _cls_query(read: Reading) -> Tensor:
    split = read.state.encoder.block_attention(read.block).split_queries
    return read.of_groups(split(_captured(read.state, f"query{read.block}", read.block))[:, :, 0])


@reads("cls_hidden")
def _cls_hidden(read: Reading) -> Tensor:
    layers = range(len(read.state.encoder.feature_layers))
    return torch.cat([read.of_groups(read.state.captured[f"hidden{i}"][:, :1]) for i in layers], dim=-1)


@reads("received_attention")
def _received(read: Reading) -> Tensor:
    state, encoder, block = read.state, read.state.encoder, read.block
    segments = encoder.segments(state.blocks[block]) if encoder.segments is not None else None
    scale = encoder.block_attention(block).scale
    queries, keys = heads(state, "query", block), heads(state, "key", block)
    return read.tokens(received_attention(queries, keys, segments=segments, scale=scale))


@reads("keys", "low_keys")
def _keys(read: Reading) -> Tensor:
    keys = heads(read.state, "key", read.block)
    tokens = read.tokens(keys)
    if not (read.with_cls and SIGNALS[read.wanted.name].prefix):
        return tokens
    return torch.cat([read.of_groups(keys[:, :, : _skipped(read.state.encoder)]), tokens], dim=2)


@reads("tile")
def _tile(read: Reading) -> Tensor:
    assert read.groups is not None
    return read.groups.tile()


@reads("clip_image_embeds")
def _clip_image_embeds(read: Reading) -> Tensor:
    assert read.companion is not None and read.state.features is not None
    return read.companion.image_embeds(read.state.features)


def heads(state: EncodeState, name: str, block: int) -> Tensor:
    """Queries or keys [T, H, N, d] of a tower block, prefix included, rotated where the tower rotates them."""
    attention = state.encoder.block_attention(block)
    split = attention.split_queries if name == "query" else attention.split_keys
    parts = split(_captured(state, f"{name}{block}", block))
    if not state.encoder.rotary:
        return parts
    cos, sin = (part[None].float() for part in state.blocks[block][names.POSITION_EMBEDDINGS])
    return rotate(parts.float(), cos, sin)


def _skipped(encoder: Encoder) -> int:
    """How many tokens in front of the patches the host takes off."""
    return encoder.num_prefix if encoder.drops_prefix else 0


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


def _record_features(encoder: Encoder, module: nn.Module, args: Any) -> None:
    """Pre-hook of the projector, before any compression."""
    state = state_of(encoder)
    if state is not None:
        state.features = args[0]


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
