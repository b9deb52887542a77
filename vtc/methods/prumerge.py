"""PruMerge and PruMerge+: keep what stands out in the [CLS] attention, and merge its neighbours into it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import attention_rows, cosine_match
from vtc.options import AtLeastOne, Score, Variant
from vtc.primitives import ascending, shift, take_rows
from vtc.stages import Links, Method, Paper, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class PruMerge(Method):
    """Outliers of the [CLS] attention are kept, and each takes in the pruned tokens with the most similar keys.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388). Attention and
    keys are those of the tower's last layer, as one head of the full width. Adaptive: the tokens above
    Q3 + 1.5 (Q3 - Q1) of an image stay, at least one and at most the budget; with `adaptive=False` the budget is met
    exactly. PruMerge+ adds tokens at an even stride, about three for each outlier. The published code renumbers
    positions (`positions="compact"`).

    By summaries of the paper's text (it was not read itself), neighbours are pruned tokens and a cluster becomes its
    attention-weighted average: the default, in raster order. The published code, `variant="reference"`, takes
    neighbours among all tokens, adds their attention-weighted sum to the kept token without normalising, orders tokens
    by attention (samples after them) and appends one token, the weighted sum of all that are not kept, which counts
    towards the budget here. It draws the quartiles over the whole batch, its count is `int(N * (count / N))`, which
    may lose one, and its stride leaves the last token out and fails if more than a third of the tokens are outliers
    (here the stride is then 1). Its non-adaptive PruMerge+, "for training", repeats tokens and is not offered.

    Args:
        adaptive: whether the image decides how many tokens stay.
        neighbours: tokens merged into each kept one; 32 in the published code.
        layer: layer of queries and keys, counted from the feature layer; 1 is the last layer of LLaVA's tower.
        score: "cls", or "received" for towers without [CLS] (ours): the attention a token receives from all others.
        variant: "paper" or "reference".
    """

    slug = "prumerge"
    paper = Paper(
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", "2403.15388", "ICCV 2025"
    )
    steps = ("outliers of the [CLS] attention", "the pruned tokens with the most similar keys", "weighted average")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B without tuning, about 40 of 576 tokens enter the LLM: TextVQA 54.0 (full 58.2), POPE 76.2 "
        "(85.9); as copied in notes on the paper"
    )
    tags = frozenset({"adaptive", "merges"})
    positions = "compact"
    defaults = {"llava": 40}  # the paper's setting without fine-tuning, by a summary
    #: whether tokens at an even stride are added
    plus: ClassVar[bool] = False

    adaptive: bool = True
    neighbours: AtLeastOne = 32
    layer: int = 1
    score: Score = "cls"
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        names = ("cls_query", "keys") if self.score == "cls" else ("received_attention", "keys")
        signals = tuple(Signal(name, layer=self.layer) for name in names)
        # with [CLS] among the tokens, its key is among the keys, as the softmax needs it
        signals += (Signal("cls_hidden"),) if self.score == "cls" else ()
        return (Stage(Site("tower_out"), self.filter, self.correlate, self.compress, signals),)

    def attention(self, tokens: Tokens) -> Tensor:
        """The attention that each token gets, prefix not included, [B, N]."""
        if self.score == "received":
            return tokens.signal("received_attention").float()
        query = tokens.signal("cls_query").flatten(1)[:, None, None]
        return attention_rows(query, self._keys(tokens)[:, None], mask=tokens.mask)[:, 0, tokens.num_prefix :]

    def filter(self, tokens: Tokens) -> Tensor:
        score, prefix = self.attention(tokens), tokens.num_prefix
        mask, index = tokens.mask[:, prefix:], torch.arange(score.shape[1], device=score.device)
        rank = score.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        slots = [max(1, k - self._extra) for k in tokens.budget]
        cap, length = (torch.tensor(row, device=score.device)[:, None] for row in (slots, tokens.lengths))
        if self.adaptive:
            count, stride = self._outliers(score, mask, length)
            outlier = (rank < count) & mask
            # the published code's stride leaves the last token out
            sample = (index % stride == 0) & (index < length - self._extra) & ~outlier & self.plus
        else:
            outlier = rank < ((cap + 3) // 4 if self.plus else cap)
            # exactly as many as are missing, evenly over the tokens that are no outliers, in raster order
            free = mask & ~outlier
            missing, total = cap - outlier.sum(1, keepdim=True), free.sum(1, keepdim=True).clamp(min=1)
            step = free.long().cumsum(dim=1) * missing
            sample = free & (step // total > (step - missing) // total)
        order = torch.where(outlier, rank, torch.where(sample, index + len(index), 2 * len(index)))
        picks = order.argsort(dim=1, stable=True)[:, : max(slots)]
        is_kept = (order.gather(1, picks) < 2 * len(index)) & (index[: picks.shape[1]] < cap)
        picks = torch.where(is_kept, picks + prefix, -1)
        return picks if self.variant == "reference" else ascending(picks)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        keys, prefix = self._keys(tokens)[:, tokens.num_prefix :], tokens.num_prefix
        kept = shift(keep, -prefix)
        pool = tokens.mask[:, prefix:] if self.variant == "reference" else self._rest(tokens, keep)
        # among all tokens each finds itself, which is taken out
        most = min(self.neighbours + (self.variant == "reference"), keys.shape[1])
        _, found = cosine_match(take_rows(keys, kept), keys, source_mask=kept >= 0, target_mask=pool, topk=most)
        found = found.masked_fill(found == kept[..., None], -1)
        found = found.gather(2, (found < 0).long().sort(dim=2, stable=True).indices)[..., : self.neighbours]
        slot = torch.arange(keep.shape[1], device=keep.device)[:, None].expand_as(found)
        weight = self.attention(tokens).gather(1, found.clamp(min=0).flatten(1))
        found, slot = found.flatten(1), slot.flatten(1)
        return Links((found + prefix).clamp(min=0), slot.masked_fill(found < 0, -1), weight.masked_fill(found < 0, 0.0))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        assert links is not None
        prefix = tokens.num_prefix
        slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).masked_fill(keep < 0, -1)
        own, given = torch.ones_like(keep, dtype=torch.float32), links.weight
        anchor, parts = keep, []
        if self.variant == "paper":
            own = self.attention(tokens).gather(1, (keep - prefix).clamp(min=0)).clamp(min=1e-12)
            total = own.scatter_add(1, links.slot.clamp(min=0), given)
            own, given = own / total, given / total.gather(1, links.slot.clamp(min=0))
        else:
            count, rest = (keep >= 0).sum(dim=1, keepdim=True), self._rest(tokens, keep)
            source = torch.arange(rest.shape[1], device=keep.device).expand_as(rest) + prefix
            has_room = count < torch.tensor(tokens.budget, device=keep.device)[:, None]
            parts = [(source, torch.where(rest & has_room, count, -1), self.attention(tokens))]
            last = torch.where(rest & has_room, source, -1).amax(dim=1, keepdim=True)
            anchor = torch.cat([keep, torch.full_like(last, -1)], dim=1).scatter(1, count, last)
            anchor = anchor[:, : max(tokens.budget)]
        parts = [(keep.clamp(min=0), slots, own), (links.source, links.slot, given), *parts]
        source, slot, weight = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        # an image decides how many tokens stay: the one wait for the device
        lengths = tuple((anchor >= 0).sum(dim=1).tolist()) if self.adaptive else tokens.budget
        token_map = TokenMap(anchor, lengths, tokens.x.shape[1], source, slot, weight)
        return token_map.in_slot_order() if self.variant == "reference" else token_map

    @property
    def _extra(self) -> int:
        return int(self.variant == "reference")

    def _keys(self, tokens: Tokens) -> Tensor:
        """Keys of all heads side by side, [B, N, C]."""
        return tokens.signal("keys").transpose(1, 2).flatten(2)

    def _rest(self, tokens: Tokens, keep: Tensor) -> Tensor:
        """True where a visual token is not kept, [B, N]."""
        outside = tokens.x.shape[1]
        is_kept = torch.zeros(len(keep), outside + 1, dtype=torch.bool, device=keep.device)
        is_kept = is_kept.scatter(1, torch.where(keep < 0, outside, keep), True)[:, :-1]
        return (tokens.mask & ~is_kept)[:, tokens.num_prefix :]

    def _outliers(self, score: Tensor, mask: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens stand out in each group, and the stride that samples three times as many, [B, 1]."""
        valid = score.masked_fill(~mask, torch.nan)
        rows = valid.reshape(1, -1) if self.variant == "reference" else valid
        low, high = torch.nanquantile(rows, torch.tensor([0.25, 0.75], device=rows.device), dim=1, keepdim=True)
        count = (rows > high + 1.5 * (high - low)).sum(dim=1, keepdim=True).clamp(min=1)
        every = length // count
        if self.variant == "reference":
            share = count.double() / length.sum()
            count, every = (length * share).long(), (1 / share).long()
        return count, (every // 3).clamp(min=1)


@register
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with additional tokens at an even stride; see `PruMerge` for the rest.

    With `adaptive=False` a quarter of the budget goes to attention and three quarters to tokens at an even stride, the
    shares that the adaptive rule leads to (ours).
    """

    slug = "prumerge-plus"
    steps = (
        "outliers of the [CLS] attention, and tokens at an even stride",
        "the pruned tokens with the most similar keys",
        "weighted average",
    )
    headline = (
        "LLaVA-1.5-7B, 128 of 576 tokens enter the LLM: average of 8 benchmarks 58.6 (full 62.1); a port, in the "
        "README of VTC-CLS"
    )
    defaults = {"llava": 144}  # a quarter of the tokens
    plus = True
