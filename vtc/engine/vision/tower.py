"""What `tower[i]` stages see of one encoder call, and which tokens of the LLM what they left becomes.

A group is what the host hands to the tower as one sequence: an image, a tile, a frame. Budgets count tokens of the LLM.
Where each patch becomes a token, they are the patches that stay. Where the host makes one token of several patches, the
tower keeps the same share of its patches, and behind it the tokens with the most of them stay.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from vtc.adapter import Adapter, Encoder, Packing
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.plan import Plan, Step
from vtc.engine.vision import passage as tower
from vtc.engine.vision.call import ENCODE, EncodeState
from vtc.engine.vision.tiles import Groups
from vtc.errors import BudgetError, UnsupportedFeatureError
from vtc.indices import take
from vtc.primitives import topk_keep
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Let every tower of the model run the `tower[i]` steps; what takes it off again goes to `undo`."""
    seen: list[Any] = []
    for encoder in adapter.encoders if plan.tower else ():
        if any(encoder.tower is other for other in seen):
            continue  # images and videos go through the same tower
        seen.append(encoder.tower)
        assert callable(encoder.halves) and encoder.attention_of is not None
        parts, begin = (encoder.halves, encoder.attention_of), functools.partial(_begin, adapter, plan)
        tower.attach(encoder.tower, encoder.blocks, parts, plan.tower, _running, begin, undo)


def decision(plan: Plan, state: EncodeState, groups: Groups) -> TokenMap | None:
    """What the tower left of `groups`, the tokens at `tower_out`; None where it is all."""
    passage, encoder = state.passage, state.encoder
    if passage is None or passage.token_map is None:
        return None
    if encoder.pool is None:
        token_map = passage.token_map
        return (without_prefix(token_map, passage.prefix) if encoder.drops_prefix else token_map).raster()
    anchor = passage.token_map.anchor
    extra = passage.prefix + passage.patches
    stays = torch.zeros(len(anchor), extra + 1, device=anchor.device)
    stays = stays.scatter(1, torch.where(anchor < 0, extra, anchor), 1.0)[:, passage.prefix : -1]
    share = groups.take(encoder.pool(stays[..., None], state.arguments)[..., 0])
    step = plan.tower[max(plan.tower)][-1]
    wanted = groups.budgets(step.budget, groups.lengths, groups.layout)
    owner = _owners(encoder, state, groups, len(anchor), passage.patches)
    kept = []
    for g, (want, length) in enumerate(zip(wanted, groups.lengths, strict=True)):
        tiles = [t for t, o in enumerate(owner) if o == g]
        left = sum(passage.lengths[t] for t in tiles)
        if left != len(tiles) * _patches(want, length, passage.patches):
            # a constant schedule or an adaptive method did not end at the budget
            reached = -(-left * length // (len(tiles) * passage.patches))
            want = min(want, reached) if "adaptive" in step.method.tags else reached
        kept.append(max(1, min(want, length)))
    inside = (
        torch.arange(share.shape[1], device=share.device) < torch.tensor(groups.lengths, device=share.device)[:, None]
    )
    return TokenMap.select(topk_keep(share, kept, mask=inside), share.shape[1], kept)


def _running() -> tower.Passage | None:
    state = ENCODE.get()
    return None if state is None else state.passage


def _begin(adapter: Adapter, plan: Plan, hidden: Float[Tensor, "T L D"]) -> tower.Passage | None:
    """The passage of the running encoder call, made from what enters the first acting block."""
    state = ENCODE.get()
    if state is None:
        return None
    encoder = state.encoder
    if state.passage is not None:
        raise UnsupportedFeatureError(
            f"{encoder.method} ran its vision tower twice in one call, and what tower[i] stages decide belongs to one "
            "run. Encode in one batch, or use a method at tower_out."
        )
    first = encoder.blocks[0]
    if names.checkpoints(first):
        raise UnsupportedFeatureError(
            "gradient checkpointing runs tower blocks twice, the second time without the state of this call. "
            "Turn it off while the model is patched."
        )
    packing = adapter.packing(encoder, state.arguments)
    make = _of_patches if encoder.pool is None else _of_pooled
    state.passage = make(encoder, state, plan.tower, packing, hidden)
    return state.passage


def _of_patches(
    encoder: Encoder,
    state: EncodeState,
    steps: Mapping[int, tuple[Step, ...]],
    packing: Packing | None,
    hidden: Tensor,
) -> tower.Passage:
    """Each patch is a token of the LLM; those that the host cuts off are hidden."""
    prefix = encoder.num_prefix
    tiles, patches = hidden.shape[0], hidden.shape[1] - prefix
    # [CLS] that the host keeps is a token of the LLM as well, and always stays
    extra = 0 if encoder.drops_prefix else prefix
    groups = Groups.of(packing, hidden.new_zeros(tiles, patches + extra, 1), None)
    lengths = tuple(n - extra for n in groups.lengths)
    layout = _square(patches, tiles, hidden.device)
    if groups.layout is not None:
        layout = groups.layout.map(lambda part: part[:, extra:])
    visible = None
    if packing is not None and (len(lengths) < tiles or min(lengths) < patches):
        visible = (packing.slot >= 0)[:, extra:].to(hidden.device)

    def targets(step: Step, current: tuple[int, ...]) -> tuple[int, ...]:
        wanted = groups.budgets(step.budget, groups.lengths, groups.layout)
        if min(wanted) <= extra:
            raise BudgetError(
                f"{step}: a budget of {min(wanted)} leaves no patch beside the {extra} prefix token(s) that this model "
                f"hands to its LLM. Use a budget above {extra}."
            )
        return _scheduled(step, lengths, [want - extra for want in wanted], current)

    return _passage(encoder, steps, prefix, patches, lengths, layout, targets, groups.rows, hidden, visible)


def _of_pooled(
    encoder: Encoder,
    state: EncodeState,
    steps: Mapping[int, tuple[Step, ...]],
    packing: Packing | None,
    hidden: Tensor,
) -> tower.Passage:
    """Several patches make a token of the LLM: every tile keeps the share of its patches that its image keeps."""
    assert encoder.pool is not None
    prefix = encoder.num_prefix
    tiles, patches = hidden.shape[0], hidden.shape[1] - prefix
    ones = torch.ones(tiles, patches, 1, device=hidden.device)
    groups = Groups.of(packing, encoder.pool(ones, state.arguments), None)
    owner = _owners(encoder, state, groups, tiles, patches)
    lengths = (patches,) * tiles

    def targets(step: Step, current: tuple[int, ...]) -> tuple[int, ...]:
        wanted = groups.budgets(step.budget, groups.lengths, groups.layout)
        share = [_patches(wanted[g], groups.lengths[g], patches) for g in owner]
        return _scheduled(step, lengths, share, current)

    layout = _square(patches, tiles, hidden.device)
    return _passage(encoder, steps, prefix, patches, lengths, layout, targets, list(range(tiles)), hidden)


def _passage(
    encoder: Encoder,
    steps: Mapping[int, tuple[Step, ...]],
    prefix: int,
    patches: int,
    lengths: tuple[int, ...],
    layout: Layout | None,
    targets: tower.Targets,
    rows: list[int],
    hidden: Tensor,
    visible: Tensor | None = None,
) -> tower.Passage:
    config: Any = encoder.tower.config
    if layout is not None:
        layout = layout.map(lambda part: pad(part, (prefix, 0), value=-1))
    return tower.Passage(
        steps,
        prefix,
        patches,
        lengths,
        layout,
        targets,
        rows,
        hidden.device,
        visible,
        implementation=names.attention_of(config),
    )


def _scheduled(step: Step, lengths: tuple[int, ...], wanted: list[int], current: tuple[int, ...]) -> tuple[int, ...]:
    wanted = [step.stage.count(n, k) for n, k in zip(lengths, wanted, strict=True)]
    return tuple(max(1, min(k, n)) for k, n in zip(wanted, current, strict=True))


def _patches(wanted: int, tokens: int, patches: int) -> int:
    """The share `wanted` of `tokens` in patches, rounded up."""
    return -(-wanted * patches // tokens)


def _owners(encoder: Encoder, state: EncodeState, groups: Groups, tiles: int, patches: int) -> list[int]:
    """The group whose tokens are made of the patches of each tile, found by sending tile numbers through the host."""
    if groups.index is None and len(groups.rows) == tiles:
        return list(range(tiles))
    assert encoder.pool is not None
    device = groups.x.device
    number = torch.eye(tiles, device=device)[:, None].expand(-1, patches, -1)
    made = encoder.pool(number, state.arguments)[groups.rows]
    if groups.index is not None:
        made = take(made, groups.index).masked_fill((groups.index < 0)[..., None], 0)
    return made.sum(dim=1).argmax(dim=0).tolist()


def _square(patches: int, tiles: int, device: torch.device) -> Layout | None:
    side = round(patches**0.5)
    return Layout.grid(side, side, tiles, device=device) if side * side == patches else None


def without_prefix(token_map: TokenMap, prefix: int) -> TokenMap:
    """The map of the patches alone, where the prefix stays as it is."""
    if not prefix:
        return token_map

    def shifted(part: Tensor) -> Tensor:
        return torch.where(part < prefix, -1, part - prefix)

    anchor, lengths = shifted(token_map.anchor)[:, prefix:], tuple(n - prefix for n in token_map.lengths)
    if token_map.source is None or token_map.slot is None or token_map.weight is None:
        return TokenMap(anchor, lengths, token_map.num_tokens - prefix)
    slot = shifted(token_map.slot).masked_fill(token_map.source < prefix, -1)
    return TokenMap(
        anchor,
        lengths,
        token_map.num_tokens - prefix,
        shifted(token_map.source).clamp(min=0),
        slot,
        token_map.weight,
        token_map.masses(),
    )
