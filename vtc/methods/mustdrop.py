"""MustDrop, the part in the vision encoder: merge windows of patches that look alike."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.catalogue.registry import register
from vtc.errors import InputError
from vtc.kernels import segment_merge
from vtc.options import Variant, Within
from vtc.primitives import at_most, mean_merge, ranks, settle, slot_of
from vtc.stages import Links, Method, Paper, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class MustDrop(Method):
    """Windows of the grid whose patches have a high mean cosine similarity become one mean token each.

    "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model" (arXiv 2411.10803). Acts on
    the output of the first block of the tower; all later blocks run on fewer tokens. `key_tokens` and `dual_attention`
    are the decisions of its later parts (the set of tokens that is never dropped, and the filter between decoder
    layers); the stages that run them in the LLM are those of `mustdrop-llm`. Merged tokens are plain means and their
    size is not used later, as in the published code. [CLS] and incomplete windows at the border stay.

    The number of tokens follows from the content. Here the budget is a ceiling: where the threshold leaves more, the
    next most similar windows are merged too, and below one token per window the most uniform windows are dropped.
    Neither is in the published code, which has no budget, and it costs: means of unlike patches after one block are
    poor input for the others. On the embedded model (576 tokens) accuracy is 0.85 at 288 tokens and 0.24 at 64, where
    random selection has 0.70 (200 questions). Order is raster order, and a merged token takes the middle patch's place.
    The published code ("reference") merges the same number of windows, the smallest, in every image of the batch, puts
    merged tokens in front by falling similarity, and has no ceiling.

    Args:
        window: patches along each edge of a window.
        threshold: mean pairwise cosine similarity from which a window is merged.
        key_share: share of tokens that the later parts never drop.
        variant: "paper" or "reference".
    """

    slug = "mustdrop"
    paper = Paper("Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", "2411.10803")
    steps = ("patches outside uniform windows, and one of each such window", "every patch to its window", "mean")
    fidelity = "golden"
    headline = (
        "all three parts, LLaVA-1.5-7B, 192 of 576 tokens on average over the layers: 97.2 % of the full model's "
        "average; as copied in a table of HoloV"
    )
    tags = frozenset({"adaptive", "merges", "needs_grid"})
    positions = "compact"

    window: Annotated[int, Within("[2, inf)")] = 3
    threshold: float = 0.8
    key_share: float = 0.08
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("tower", 0), self.filter, self.correlate, self.compress),)

    def filter(self, tokens: Tokens) -> Tensor:
        window, count, is_anchor = self._windows(tokens)
        similarity, is_complete = self._similarity(tokens, window, count)
        place = ranks(similarity, is_complete)
        number = (is_complete & (similarity >= self.threshold)).sum(dim=1, keepdim=True)
        if self.variant == "reference":
            number = number.min()
        else:
            saved = self.window**2 - 1
            need = [math.ceil((n - k) / saved) for n, k in zip(tokens.lengths, tokens.budget, strict=True)]
            number = torch.maximum(number, torch.tensor(need, device=number.device)[:, None])
        is_merged = _at(is_complete & (place < number), window)
        kept = tokens.mask & (~is_merged | is_anchor)
        width, index = tokens.x.shape[1], torch.arange(tokens.x.shape[1], device=kept.device)
        is_prefix = index < tokens.num_prefix
        order = index.expand_as(window)
        if self.variant == "reference":
            order = torch.where(is_prefix, index - width, torch.where(is_merged, _at(place, window) - width, index))
            order = order - is_prefix * width
        else:
            # more than the ceiling only where every window is merged already: the most uniform ones go
            score = torch.where(is_merged, -_at(similarity, window), 2.0)
            kept = at_most(score, kept & ~is_prefix, tokens.budget) | (is_prefix & tokens.mask)
            width = min(width, max(tokens.budget) + tokens.num_prefix)
        first = order.masked_fill(~kept, 2 * tokens.x.shape[1]).sort(dim=1, stable=True).indices[:, :width]
        return first.masked_fill(~kept.gather(1, first), -1)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        """Every patch of a merged window to the slot of the patch that stayed of it."""
        window, count, is_anchor = self._windows(tokens)
        slot = slot_of(keep, tokens.x.shape[1])
        index = torch.arange(tokens.x.shape[1], device=keep.device).expand_as(window)
        heir = torch.zeros(window.shape[0], count + 1, dtype=torch.long, device=keep.device)
        heir = heir.scatter(1, torch.where(is_anchor, window, count), index)
        goes = (slot < 0) & (window < count) & tokens.mask
        slot = slot.gather(1, heir.gather(1, window)).masked_fill(~goes, -1)
        return Links(index, slot, (slot >= 0).float())

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        token_map = mean_merge(*settle(tokens, keep), links)
        return token_map.in_slot_order() if self.variant == "reference" else token_map

    def key_tokens(self, attention: Tensor) -> Tensor:
        """The share of tokens that [CLS] of the last block attends to most, bool [B, N]."""
        return ranks(attention.float()) < math.ceil(self.key_share * attention.shape[1])

    def _windows(self, tokens: Tokens) -> tuple[Tensor, int, Tensor]:
        """Window of each patch, how many there are (also the mark of "in none"), and which patch inherits the place."""
        layout = tokens.layout
        if layout is None:
            raise InputError("method 'mustdrop' merges windows of a grid, and these tokens have no layout.")
        size = self.window
        shapes = [[(h // size, w // size) for h, w in grids] for grids in layout.grids]
        most = max(len(group) for group in shapes)
        shape = torch.tensor([group + [(0, 0)] * (most - len(group)) for group in shapes], device=layout.row.device)
        ends = (shape[..., 0] * shape[..., 1]).cumsum(dim=1)
        count = max(sum(h * w for h, w in group) for group in shapes)
        segment = layout.segment.clamp(min=0)
        height, width = (part.gather(1, segment) for part in shape.unbind(dim=2))
        first = (ends - shape[..., 0] * shape[..., 1]).gather(1, segment)
        row, column = layout.row // size, layout.col // size
        outside = (layout.row < 0) | (row >= height) | (column >= width) | ~tokens.mask
        heir = size - 1 if self.variant == "reference" else size // 2
        is_anchor = ~outside & (layout.row % size == heir) & (layout.col % size == heir)
        return (first + row * width + column).masked_fill(outside, count), count, is_anchor

    def _similarity(self, tokens: Tokens, window: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean cosine similarity of the pairs in each window, [B, windows + 1], and which windows are complete."""
        size = self.window**2
        unit = normalize(tokens.x.float(), dim=-1)
        # |sum of unit vectors|^2 is the sum over all pairs, each vector with itself included
        pairs = segment_merge(unit, window, count + 1, reduce="sum").square().sum(dim=-1)
        own = pairs.new_zeros(pairs.shape).scatter_add(1, window, unit.square().sum(dim=-1))
        number = pairs.new_zeros(pairs.shape).scatter_add(1, window, torch.ones_like(unit[..., 0]))
        real = torch.arange(count + 1, device=window.device) < count
        return (pairs - own) / (size * (size - 1)), (number == size) & real


def dual_attention(
    attention: Tensor, is_text: Tensor, protect: Tensor, *, global_threshold: float, individual_threshold: float
) -> Tensor:
    """Which tokens the text still looks at, bool [B, N], from attention [B, T, N] of text rows (mean over heads).

    A token goes when both its share of all attention that visual tokens get from the text is below
    `global_threshold` and no text token gives it `individual_threshold`. `protect` marks tokens that stay anyway.
    """
    attention = attention.float() * is_text[..., None]
    total = attention.sum(dim=1)
    is_low = total < global_threshold * total.sum(dim=1, keepdim=True)
    return ~(is_low & (attention.amax(dim=1) < individual_threshold)) | protect


def _at(value: Tensor, window: Tensor) -> Tensor:
    """`value` of the window of each patch."""
    return value.gather(1, window)
