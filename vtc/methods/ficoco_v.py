"""FiCoCo-V: filter, correlate, compress inside the vision tower."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad
from torch.nn.utils.rnn import pad_sequence

from vtc.catalogue.registry import register
from vtc.kernels import attention_rows, received_attention
from vtc.options import Count, OneOf, Share, Variant, Within
from vtc.primitives import (
    even_pace,
    ranks_within,
    rest_of,
    self_preserving_merge,
    shift,
    slot_of,
    targets_above,
    top_links,
    topk_keep,
)
from vtc.stages import Links, Method, Paper, Repeat, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

PAPER = Paper(
    "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration", "2411.17686", "AAAI 2026"
)

#: what differs between paper and published code: option -> (paper, reference)
DIFFERENCES: dict[str, tuple[str, str]] = {
    "lam_on": ("patches", "cls"),
    "terms": ("plain", "normed"),
    "targets": ("kept", "all"),
    "order": ("raster", "score"),
    "windows": ("fresh", "carried"),
}


def follows_reference(method: Method, name: str, differences: Mapping[str, tuple[str, str]]) -> bool:
    """Whether option `name` is what the published code does; "auto" is what the field `variant` says."""
    value = getattr(method, name)
    chosen: str = getattr(method, "variant")  # noqa: B009
    return chosen == "reference" if value == "auto" else value == differences[name][1]


@register
@dataclass(frozen=True)
class FiCoCoV(Method):
    """Redundant patches are merged, by attention, between attention and MLP of each block of the tower's second half.

    "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration" (arXiv 2411.17686).

    - filter: redundancy s_i = lam * (attention that i receives from the patches) - (1 - lam) * (attention [CLS] gives
      i). In each 2x2 window of the grid the largest s counts double (half, where negative), so that what goes is spread
      over the image. The largest go.
    - correlate: i goes to the tokens that stay whose attention from i reaches its `quantile`.
    - compress: x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij), alpha the attention, made to sum to 1 over j.

    Where to start and how many go per block are the published ones for CLIP-L: blocks 12..22 of those up to the
    feature layer, that is their second half, and the same number in each. It follows from the budget, or is `r` (the
    published code's 42), and the budget is then the least that stays. Towers without [CLS] use the paper's substitute
    -cos(mean key, key), and both terms are scaled to norm 1, having no common unit.

    The formulas say A without saying which. "softmax" takes probabilities, and of them what the text calls
    attention-in (a mean of a row of probabilities would be the same for all). "logits" takes means of scaled logits
    over a row, as the published code, and is better on the embedded model: 0.86 against 0.74 at 64 of 576 tokens (200
    questions).

    The published code differs from the paper in five more places. Each is an option, "auto" is what `variant` says,
    and `variant="reference"` equals all recorded arrays of that code (0.765 on the same questions). What it does is
    not always meant: with `order="score"` the tokens that stay are sorted by score and [CLS] comes last, while merged
    features are added at the places of the order before. So they land on other tokens (on none where more tokens go
    than stay), from the second block on a patch is taken for [CLS], and the LLM gets [CLS] in the place of that patch.
    With `windows="carried"` a cell of the grid in which a window's maximum was found is out for later blocks, and the
    n scores of a block fill the free cells from the first one on, whichever tokens they belong to. The code never
    resets this, here it begins anew with every image.

    Args:
        lam: weight of redundancy against [CLS] attention.
        quantile: epsilon, from which share of its attention on a token receives from another.
        penalty: spread what goes over windows.
        first: first block (0-based); -1: the second half of the tower.
        r: tokens merged per block; 0: from the budget.
        attention: "softmax" or "logits".
        variant: "paper" or "reference", what "auto" means.
        lam_on: the term that lam weighs, the other one has 1 - lam: "patches" (paper) or "cls" (reference).
        terms: "plain" (paper) or of norm 1 over the patches ("normed", reference). Without [CLS] always normed.
        targets: tokens that compete for merged ones, and of which the quantile is taken: those that stay ("kept",
            paper) or all ("all", reference; a share that falls on one that goes is lost, or misplaced).
        order: "raster" (paper) or "score" (reference).
        windows: "fresh" in each block (paper), or "carried" (reference).
    """

    slug = "ficoco-v"
    paper = PAPER
    steps = (
        "received attention against [CLS] attention, spread over 2x2 windows",
        "the tokens with the top attention",
        "mean with weights alpha, own weight 1",
    )
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 1.5 of 8.5 TFLOPs (about 64 tokens leave the tower): 92.7 % of the full model's "
        "average over 6 benchmarks; table 1 of version 4 of the paper"
    )
    tags = frozenset({"merges", "needs_grid"})
    positions = "compact"
    at = "first"

    lam: Share = 0.35
    quantile: Share = 0.998
    penalty: bool = True
    first: Annotated[int, Within("[-1, inf)")] = -1
    r: Count = 0
    attention: Annotated[str, OneOf("softmax", "logits")] = "logits"
    variant: Variant = "paper"
    lam_on: Annotated[str, OneOf("auto", *DIFFERENCES["lam_on"])] = "auto"
    terms: Annotated[str, OneOf("auto", *DIFFERENCES["terms"])] = "auto"
    targets: Annotated[str, OneOf("auto", *DIFFERENCES["targets"])] = "auto"
    order: Annotated[str, OneOf("auto", *DIFFERENCES["order"])] = "auto"
    windows: Annotated[str, OneOf("auto", *DIFFERENCES["windows"])] = "auto"

    def stages(self) -> tuple[Stage, ...]:
        site = Site("tower", 0.5 if self.first < 0 else self.first)
        budget = Budget(tokens=1) if self.r and self.budget is None else None
        signals = (Signal("keys"), Signal("queries"))
        carry = self.taken if self.penalty and self.is_reference("windows") else None
        repeat = Repeat(self.pace, carry)
        return (Stage(site, self.filter, self.correlate, self.compress, signals, budget=budget, schedule=repeat),)

    def is_reference(self, name: str) -> bool:
        """Whether option `name` is what the published code does."""
        return follows_reference(self, name, DIFFERENCES)

    def pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay after block `step` of `steps`."""
        if self.r:
            return max(budget, total - self.r * (step + 1))
        return even_pace(total, budget, step, steps)

    def filter(self, tokens: Tokens) -> Tensor:
        """The prefix and the least redundant patches in raster order, or by falling redundancy and the prefix last."""
        prefix = tokens.num_prefix
        redundancy = self.redundancy(tokens)
        if self.penalty:
            redundancy = self.spread(tokens, redundancy)
        kept = topk_keep(-redundancy, tokens.budget, mask=tokens.mask[:, prefix:])
        front = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        keep = torch.cat([front, shift(kept, prefix)], dim=1)
        if not self.is_reference("order"):
            return keep
        last = redundancy.new_full((len(keep), prefix), torch.finfo(redundancy.dtype).min)
        score = torch.cat([last, redundancy], dim=1).gather(1, keep.clamp(min=0)).masked_fill(keep < 0, -torch.inf)
        return keep.gather(1, score.sort(dim=1, descending=True, stable=True).indices)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        kept = self._kept(tokens)
        rest = rest_of(keep, tokens.ends, kept, tokens.x.shape[1])
        queries = tokens.signal("queries")
        index = rest.clamp(min=0)[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        is_softmax = self.attention == "softmax"
        rows = attention_rows(queries.gather(2, index), tokens.signal("keys"), mask=tokens.mask, softmax=is_softmax)
        weight = rows if is_softmax else rows.softmax(dim=2)
        if self.is_reference("targets"):
            counts = targets_above(self.quantile, tokens.ends, strict=True)
        else:
            counts = targets_above(self.quantile, tokens.budget)
            is_target = slot_of(keep, weight.shape[2]) >= 0
            is_target[:, : tokens.num_prefix] = False  # the prefix takes nothing in
            weight = weight.masked_fill(~is_target[:, None], 0)
        if not self.is_reference("order"):
            return top_links(weight, rest, keep, counts, only_kept=False)
        places = torch.arange(weight.shape[2], device=keep.device).expand(len(keep), -1)
        links = top_links(weight, rest, places, counts, only_kept=False)
        # the place before the sorting, moved by the number of tokens that go where it lies behind the new end
        end, gone = (torch.tensor(part, device=keep.device)[:, None] for part in (kept, self._gone(tokens)))
        slot = torch.where(links.slot >= end, links.slot - gone, links.slot).clamp(min=-1)
        return links._replace(slot=slot, weight=links.weight.masked_fill(slot < 0, 0))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        token_map = self_preserving_merge(replace(tokens, budget=tuple(self._kept(tokens))), keep, links)
        return token_map.in_slot_order() if self.is_reference("order") else token_map

    def redundancy(self, tokens: Tokens) -> Tensor:
        """s of each patch, before the windows, [B, N]."""
        prefix, keys, queries = tokens.num_prefix, tokens.signal("keys"), tokens.signal("queries")
        is_patch = tokens.mask[:, prefix:]
        is_softmax = self.attention == "softmax"
        if not is_softmax:
            # the mean of the logits of a row is the logit for the mean key
            counts = is_patch.sum(dim=1)[:, None, None, None]
            mean = (keys[:, :, prefix:].float() * is_patch[:, None, :, None]).sum(dim=2, keepdim=True) / counts
            among = attention_rows(mean, queries.float(), softmax=False)[:, 0, prefix:]
        else:
            among = received_attention(queries, keys, segments=torch.where(tokens.mask, 0, -1))[:, prefix:]
        if prefix:
            row = attention_rows(queries[:, :, :1], keys, mask=tokens.mask, softmax=is_softmax)
            salience = row[:, 0, prefix:]
        else:
            metric = keys.float().mean(dim=1) * is_patch[..., None]
            center = metric.sum(dim=1, keepdim=True) / is_patch.sum(dim=1)[:, None, None]
            salience = -cosine_similarity(metric, center, dim=2)
        if self.is_reference("terms") or not prefix:
            among, salience = (normalize(part.masked_fill(~is_patch, 0), dim=1) for part in (among, salience))
        lam = 1.0 - self.lam if self.is_reference("lam_on") else self.lam
        return (lam * among - (1.0 - lam) * salience).masked_fill(~is_patch, 0)

    def spread(self, tokens: Tokens, redundancy: Tensor) -> Tensor:
        """`redundancy` with the largest of each 2x2 window made larger: doubled, or halved where negative."""
        carried = self.is_reference("windows")
        is_first = self.free_maxima(tokens, redundancy)[0] if carried else self.window_maxima(tokens, redundancy)
        return torch.where(is_first, redundancy * torch.where(redundancy > 0, 2.0, 0.5), redundancy)

    def window_maxima(self, tokens: Tokens, redundancy: Tensor) -> Tensor:
        """Which patches are the most redundant ones of their window, bool [B, N]; none where there is no grid."""
        layout, prefix = tokens.layout, tokens.num_prefix
        if layout is None:
            return torch.zeros_like(redundancy, dtype=torch.bool)
        most = max(len(grids) for grids in layout.grids)
        width = (max(w for grids in layout.grids for _, w in grids) + 1) // 2
        height = (max(h for grids in layout.grids for h, _ in grids) + 1) // 2
        row, col, segment = (part[:, prefix:] for part in (layout.row, layout.col, layout.segment))
        is_placed = tokens.mask[:, prefix:] & (row >= 0)
        window = (segment.clamp(min=0) * height + row.clamp(min=0) // 2) * width + col.clamp(min=0) // 2
        place = ranks_within(redundancy, window.masked_fill(~is_placed, 0), most * height * width, is_placed)
        return is_placed & (place == 0)

    def free_maxima(self, tokens: Tokens, redundancy: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the free cells, filled in order: which patches count double, and the cells taken by now [B, M].

        A patch counts double when the maximum of a window lies in the cell with its own number.
        """
        patches, layout = redundancy.shape[1], tokens.layout
        if layout is None:
            return torch.zeros_like(redundancy, dtype=torch.bool), torch.zeros_like(redundancy, dtype=torch.bool)
        window = _windows(layout.grids).to(redundancy.device)
        taken = tokens.signals.get("carried", torch.zeros_like(window, dtype=torch.bool))
        free = (window >= 0) & ~taken
        rank = free.cumsum(dim=1) - 1
        ends = torch.tensor(tokens.lengths, device=rank.device)[:, None]
        filled = free & (rank < ends)
        value = redundancy.gather(1, rank.clamp(min=0, max=patches - 1))
        parts = int(window.shape[1])  # more than there are windows, and known without asking the device
        place = ranks_within(value, window.masked_fill(~filled, 0), parts, filled)
        cell = torch.arange(window.shape[1], device=rank.device)
        found = filled & (place == 0) & (cell < ends)
        return pad(found, (0, max(0, patches - found.shape[1])))[:, :patches], taken | found

    def taken(self, tokens: Tokens) -> Tensor:
        """Cells of the grid that are not free for later blocks, bool [B, M]."""
        return self.free_maxima(tokens, self.redundancy(tokens))[1]

    def _kept(self, tokens: Tokens) -> list[int]:
        return [k + tokens.num_prefix for k in tokens.budget]

    def _gone(self, tokens: Tokens) -> list[int]:
        return [n - k for n, k in zip(tokens.lengths, tokens.budget, strict=True)]


def _windows(grids: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    """The 2x2 window of each cell, numbered over all grids of a group, [B, M]; -1 behind the last cell."""
    rows = []
    for segments in grids:
        first, parts = 0, []
        for height, width in segments:
            across = (width + 1) // 2
            window = torch.arange(height)[:, None] // 2 * across + torch.arange(width) // 2
            parts.append(window.flatten() + first)
            first += (height + 1) // 2 * across
        rows.append(torch.cat(parts))
    return pad_sequence(rows, batch_first=True, padding_value=-1)
