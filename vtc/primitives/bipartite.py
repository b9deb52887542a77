"""Bipartite matching of tokens by turns (ToMe): which tokens a matching leaves, and in which order."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.primitives.merging import assign_nearest
from vtc.primitives.ranking import ranks
from vtc.primitives.selection import rest_of, valid_prefix
from vtc.stages import Links
from vtc.tokens import Tokens


def bipartite_keep(tokens: Tokens, value: Float[Tensor, "B S"], merged: Sequence[int]) -> Int[Tensor, "B K"]:
    """Prefix, the even tokens that stay, then the odd ones, after the `merged[b]` best even tokens of group b are gone.

    The even tokens stay in their order where there is a prefix and by ascending similarity where there is none, as the
    published code has it: the next matching pairs tokens by their places.

    Args:
        tokens: of which every even one found its best odd one.
        value: how similar these are, from `vtc.kernels.bipartite_match`.
        merged: how many even tokens of each group are merged, at most all that found a partner.
    """
    prefix, width = tokens.num_prefix, tokens.x.shape[1]
    place = ranks(value)
    gone = torch.tensor(list(merged), device=value.device)[:, None]
    index = torch.arange(width, device=value.device)
    order = index[::2].expand_as(place) if prefix else place
    key = (index + 2 * width).expand(len(tokens.lengths), -1).clone()
    key[:, ::2] = torch.where(place < gone, 9 * width, order + width)
    key = torch.where((index < prefix) | (gone == 0), index, key).masked_fill(~tokens.mask, 9 * width)
    kept = [end - m for end, m in zip(tokens.ends, merged, strict=True)]
    keep = key.sort(dim=1, stable=True).indices[:, : max(kept)]
    return keep.masked_fill(~valid_prefix(kept, keep.shape[1], keep.device), -1)


def bipartite_links(
    tokens: Tokens, metric: Float[Tensor, "B N d"], keep: Int[Tensor, "B K"], kept: Sequence[int]
) -> Links:
    """Each token that is not in `keep` goes to its most similar odd one; `kept` are the lengths of `keep`."""
    rest = rest_of(keep, tokens.ends, kept, tokens.x.shape[1])
    return assign_nearest(metric, keep, rest, targets=(keep % 2 == 1) & (keep >= tokens.num_prefix))
