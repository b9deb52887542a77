"""Correlate and compress rules: who is merged into whom, and what the staying token becomes.

Every compress rule has the signature of `vtc.stages.drop`: (tokens, keep, links) -> TokenMap.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.indices import take
from vtc.kernels import cosine_match
from vtc.primitives.selection import take_rows
from vtc.stages import Links, drop, keep_lengths
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


def assign_nearest(
    metric: Float[Tensor, "B N d"],
    keep: Int[Tensor, "B K"],
    rest: Int[Tensor, "B R"],
    *,
    targets: Bool[Tensor, "B K"] | None = None,
) -> Links:
    """Each token of `rest` goes to the slot of `keep` with the largest cosine similarity (first on ties).

    Args:
        metric: what is compared.
        targets: slots that may receive tokens; None: all.
    """
    target_mask = keep >= 0 if targets is None else (keep >= 0) & targets
    source_mask = rest >= 0
    _, index = cosine_match(
        take_rows(metric, rest), take_rows(metric, keep), source_mask=source_mask, target_mask=target_mask
    )
    slot = index[..., 0].masked_fill(~source_mask, -1)
    return Links(rest.clamp(min=0), slot, (slot >= 0).float())


def mean_merge(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """A staying token becomes the mean of itself and its members."""
    return self_preserving_merge(tokens, keep, links)


def self_preserving_merge(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij), alpha the weights of the links.

    With weights 1 this is the mean of a token and its members.
    """
    if links is None:
        return drop(tokens, keep, links)
    total = 1.0 + _received(links.weight, links.slot, keep.shape[1])
    scale = 1.0 / total
    return _joined(tokens, keep, links, own=scale, given=links.weight * take(scale, links.slot))


def size_weighted_merge(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """A staying token becomes the mean of itself and its members, each weighted by its size (signal "sizes")."""
    if links is None:
        return drop(tokens, keep, links)
    size = tokens.signal("sizes").float()
    own = take(size, keep).masked_fill(keep < 0, 0)
    given = size.gather(1, links.source) * links.weight
    total = own + _received(given, links.slot, keep.shape[1])
    scale = 1.0 / total.masked_fill(keep < 0, 1)
    return _joined(tokens, keep, links, own=own * scale, given=given * take(scale, links.slot))


def sum_merge(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """x_j <- x_j + sum_i alpha_ij x_i, alpha the weights of the links (FiCoCo-L's published code)."""
    if links is None:
        return drop(tokens, keep, links)
    return _joined(tokens, keep, links, own=torch.ones_like(keep).float(), given=links.weight)


def add_mean(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """x_j <- x_j + mean of its members (VisionZip's published code); without members x_j stays."""
    if links is None:
        return drop(tokens, keep, links)
    count = _received((links.slot >= 0).float(), links.slot, keep.shape[1]).clamp(min=1)
    return _joined(tokens, keep, links, own=torch.ones_like(count), given=links.weight / take(count, links.slot))


def _joined(
    tokens: Tokens, keep: Int[Tensor, "B K"], links: Links, own: Float[Tensor, "B K"], given: Float[Tensor, "B E"]
) -> TokenMap:
    """The map in which slot k holds own[k] of its anchor and `given` of what the links bring."""
    slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).masked_fill(keep < 0, -1)
    return TokenMap(
        keep,
        keep_lengths(tokens, keep),
        tokens.x.shape[1],
        source=torch.cat([keep.clamp(min=0), links.source], dim=1),
        slot=torch.cat([slots, links.slot], dim=1),
        weight=torch.cat([own.float(), given.float()], dim=1),
    )


def _received(weight: Float[Tensor, "B E"], slot: Int[Tensor, "B E"], slots: int) -> Float[Tensor, "B K"]:
    """Sum of the weights that arrive at each slot; the extra column in front takes the padding."""
    out = weight.new_zeros(weight.shape[0], slots + 1)
    return out.scatter_add(1, slot + 1, weight)[:, 1:]
