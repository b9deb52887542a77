"""SparseVLM and SparseVLM+: drop in steps what the words that matter ignore, and recycle part of it as clusters."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.options import Ascending, OneOf, Variant, Within
from vtc.primitives import (
    density_peaks,
    geometric_pace,
    instruction,
    join_keep,
    keep_where,
    ranks,
    rest_of,
    settle,
    slot_of,
    take_rows,
    topk_keep,
    valid_prefix,
)
from vtc.stages import Links, Method, Paper, Schedule, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

#: behind layers 2, 6 and 15 of 32
DEPTHS = (3 / 32, 7 / 32, 16 / 32)
#: visual tokens of the published settings
TOKENS = 576

#: published setting -> tokens after each cut
Lists = dict[int, tuple[int, ...]]


@register
@dataclass(frozen=True)
class SparseVLM(Method):
    """Three cuts by the attention of text raters; a part of what goes comes back as means of clusters.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417), in the
    form of version 1.5 of its code.

    - raters: the tokens behind the image (all text, where nothing follows) to which the visual tokens are close: the
      softmax over the text of the inner products of the embeddings, mean over the visual tokens, above its own mean.
    - filter: the mean attention of the raters in the layer before the cut. "schedule": as many as the published lists
      say; "rank": int(rank * scale + bias), the rank that of the raters' attention to the visual tokens (version 1.0).
    - correlate: the `recycle` share of the dropped tokens with the highest scores falls into clusters around density
      peaks, a tenth as many.
    - compress: the mean of each cluster, appended behind the tokens that stay.

    The lists of version 1.5 are made for 576 tokens and four budgets, each named by what is seen on average by 32
    layers (recycled tokens included, layers 2, 6 and 15 as if cut before). Here they are shares of N, with straight
    lines between them for other budgets. "average": the budget is that name; "final": what is left after the last cut.
    With `counts`, or other than three layers, no list applies. Positions are counted anew after each cut, as published.
    All images of a sample form one pool (the published code takes one).

    Recycled tokens are part of the count of each cut, so that it is met exactly. In `variant="reference"`, as in the
    published code, a cut counts those that stay as they are, recycled ones come on top, and the rank rule has no
    ceiling. That code breaks ties of densities by unseeded noise; here the earlier token wins. With
    `positions="original"`, `place="own"` leaves every token that stays at its own place.

    Args:
        layers: layers from which on fewer tokens are seen (0-based); (): 3, 7 and 16 of 32, as shares of the depth.
        counts: tokens that stay after each cut instead of a list; then the budget, if there is one, is the least.
        convention: what the budget counts, "average" or "final".
        rule: "schedule" or "rank". For the rank rule the budget is a ceiling, and the count follows from the content.
        scale, bias: of the rank rule; published: (13.5, 0) for 192 tokens, (9, 6) for 128, (0.8, 0) for 64.
        recycle: share of the dropped tokens that is clustered (tau); 0: none.
        clusters: clusters per recycled token (theta).
        place: where recycled tokens stand: at the "end", or at the "own" place of the best token of the cluster.
        variant: "paper" or "reference".
    """

    slug = "sparsevlm"
    paper = Paper(
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        "2410.04417",
        "ICML 2025",
    )
    steps = ("top-k attention of text raters, in three cuts", "dropped tokens to density peaks", "mean of clusters")
    fidelity = "golden"
    headline = (
        "version 1.0, LLaVA-1.5-7B, 64 of 576 tokens on average over the layers, cutting layers counted as cut: 87.3 "
        "% of the full model's average over 9 benchmarks; as copied in table 1 of HoloV"
    )
    tags = frozenset({"merges", "query_aware"})
    positions: ClassVar[Literal["original", "compact", "renumber"]] = "renumber"
    at = "layers"
    defaults = {"llava": 192}  # the first of the published lists

    lists: ClassVar[Lists] = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}

    layers: Annotated[tuple[int, ...], Ascending()] = ()
    counts: tuple[int, ...] = ()
    convention: Annotated[str, OneOf("average", "final")] = "average"
    rule: Annotated[str, OneOf("schedule", "rank")] = "schedule"
    scale: float = 13.5
    bias: float = 0.0
    recycle: Annotated[float, Within("[0, 1)", "a share")] = 0.3
    clusters: Annotated[float, Within("[0, 1)", "a share")] = 0.1
    place: Annotated[str, OneOf("end", "own")] = "end"
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = len(self.layers or DEPTHS)
        if self.counts and (len(self.counts) != cuts or any(count < 1 for count in self.counts)):
            raise SpecError(
                f"counts={self.counts} of method {self.slug!r}: a number from 1 on for each of {cuts} cuts."
            )
        if not self.counts and self.convention == "average" and cuts != len(DEPTHS):
            raise SpecError(
                f"layers={self.layers} of method {self.slug!r}: the published lists have {len(DEPTHS)} cuts. Use "
                "convention='final' (an equal share of what is left at each cut), or counts."
            )
        follows = {"adaptive": self.rule == "rank", "merges": self.recycle > 0}
        object.__setattr__(self, "tags", self.tags | {tag for tag, holds in follows.items() if holds})

    def stages(self) -> tuple[Stage, ...]:
        budget = Budget(tokens=1) if self.counts and self.budget is None else None
        signals = tuple(Signal(name) for name in (*self._attention, "text_embeds", "text_after", "visual_embeds"))
        return tuple(
            Stage(
                Site("layer", layer),
                self.filter,
                self.correlate if self.recycle else None,
                self.compress,
                signals,
                pool="sample",
                budget=budget,
                schedule=self._schedule(cut),
            )
            for cut, layer in enumerate(self.layers or DEPTHS)
        )

    def filter(self, tokens: Tokens) -> Tensor:
        """The tokens that stay as they are."""
        score = self.score(tokens)
        if self.rule == "schedule":
            return topk_keep(score, [kept for kept, _ in self._plan(tokens)], mask=tokens.mask)
        most = [self._split(n, m)[0] for n, m in zip(tokens.lengths, tokens.budget, strict=True)]
        if self.variant == "reference":
            most = [*tokens.lengths]
        kept = torch.minimum(self.ranked(tokens), torch.tensor(most, device=score.device)[:, None])
        return keep_where(tokens.mask & (ranks(score, tokens.mask) < kept), tokens.x.shape[1])

    def correlate(self, tokens: Tokens, keep: Tensor, noise: Tensor | None = None) -> Links:
        """The best of the dropped tokens to clusters, whose slots follow those of `keep`; the weights are means.

        `noise` [B, R] is added to the densities of the clustered tokens, in descending order of their scores.
        """
        plan = self._plan(tokens, keep)
        rest = rest_of(keep, tokens.lengths, [kept for kept, _ in plan], tokens.x.shape[1])
        sizes = [self._pool(n - kept) if count else 0 for n, (kept, count) in zip(tokens.lengths, plan, strict=True)]
        score = self.score(tokens).gather(1, rest.clamp(min=0)).masked_fill(rest < 0, -torch.inf)
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : max(sizes)]
        inside = valid_prefix(sizes, best.shape[1], best.device)
        pool = rest.gather(1, best).clamp(min=0)
        counts = [count for _, count in plan]
        _, cluster = density_peaks(take_rows(tokens.x, pool), inside, counts, neighbours=counts, noise=noise)
        members = cluster.new_zeros(cluster.shape[0], max(counts) + 1)
        members = members.scatter_add(1, cluster + 1, torch.ones_like(cluster)).gather(1, cluster + 1)
        first = torch.tensor([kept for kept, _ in plan], device=cluster.device)[:, None]
        missing = cluster < 0
        return Links(pool, torch.where(missing, -1, cluster + first), (1.0 / members).masked_fill(missing, 0))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        plan = self._plan(tokens, keep)
        kept, total = [k for k, _ in plan], tuple(k + count for k, count in plan)
        keep = keep[:, : max(kept)]
        if links is None or total == tuple(kept):
            return TokenMap.select(keep, tokens.x.shape[1], total)
        counts = [count for _, count in plan]
        slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).masked_fill(keep < 0, -1)
        places = self._last_places(tokens, keep, counts) if self.place == "end" else _best_places(links, kept, counts)
        token_map = TokenMap(
            join_keep(keep, places)[:, : max(total)],
            total,
            tokens.x.shape[1],
            source=torch.cat([keep.clamp(min=0), links.source], dim=1),
            slot=torch.cat([slots, links.slot], dim=1),
            weight=torch.cat([(keep >= 0).float(), links.weight], dim=1),
        )
        return token_map.in_slot_order() if self.place == "end" else token_map.raster()

    def score(self, tokens: Tokens) -> Float[Tensor, "B N"]:
        """Mean attention of the raters."""
        raters = self.raters(tokens)[..., None]
        attention = tokens.signal("text_attention").float() * raters
        return attention.sum(dim=1) / raters.sum(dim=1).clamp(min=1)

    def raters(self, tokens: Tokens) -> Bool[Tensor, "B T"]:
        """Text tokens to which the visual tokens are closer than to the mean one."""
        is_text = instruction(tokens)
        visual, seen = tokens.signal("visual_embeds").float(), tokens.signal("visual_mask")[..., None]
        logits = visual @ tokens.signal("text_embeds").float().transpose(1, 2)  # [B, V, T]
        near = logits.masked_fill(~is_text[:, None], -torch.inf).softmax(dim=2).masked_fill(~seen, 0)
        near = near.sum(dim=1) / seen.sum(dim=1)
        # their mean is one over the number of text tokens; equal ones are raters all
        mean = near.sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True)
        raters = is_text & (near > mean)
        return torch.where(raters.any(dim=1, keepdim=True), raters, is_text)

    def ranked(self, tokens: Tokens) -> Int[Tensor, "B 1"]:
        """How many tokens the rank rule keeps; a full rank keeps all."""
        raters = self.raters(tokens)
        block = tokens.signal("text_attention").float() * raters[..., None] * tokens.mask[:, None]
        size = torch.maximum(raters.sum(dim=1), tokens.mask.sum(dim=1))
        rank = torch.linalg.matrix_rank(block, rtol=size * torch.finfo(torch.float32).eps)
        length = tokens.mask.sum(dim=1)
        count = torch.minimum((rank * self.scale + self.bias).long(), length - 1).clamp(min=1)
        return torch.where(rank == length, length, count)[:, None]

    @property
    def _attention(self) -> tuple[str, ...]:
        return ("text_attention",)

    def _schedule(self, cut: int) -> Schedule:
        """Tokens that stay after cut number `cut` (from 0)."""
        if self.counts:
            return lambda n, k: max(k, self.counts[cut])
        if self.layers and len(self.layers) != len(DEPTHS):
            return lambda n, k: geometric_pace(n, k, cut, len(self.layers))
        rows = [(name, row if self.variant == "reference" else self._totals(row)) for name, row in self.lists.items()]
        points = sorted((row[-1] if self.convention == "final" else name, row[cut]) for name, row in rows)
        return lambda n, k: max(1, round(interpolated(points, k / n) * n))

    def _totals(self, row: Sequence[int]) -> list[int]:
        """What is left after each cut of a list, with the clusters that come back."""
        totals, have = [], TOKENS
        for kept in row:
            have = kept + self._clusters(have - kept)
            totals.append(have)
        return totals

    def _plan(self, tokens: Tokens, keep: Tensor | None = None) -> list[tuple[int, int]]:
        """For each group, how many tokens stay and how many clusters follow; `keep` is what the rank rule chose."""
        lengths, budget = tokens.lengths, tokens.budget
        if self.rule == "rank":
            assert keep is not None
            budget = settle(tokens, keep)[0].budget
        elif self.variant == "paper":
            return [self._split(n, m) for n, m in zip(lengths, budget, strict=True)]
        plan = [(m, self._clusters(n - m)) for n, m in zip(lengths, budget, strict=True)]
        if self.variant == "reference":
            return plan
        return [(k, min(count, most - k)) for (k, count), most in zip(plan, tokens.budget, strict=True)]

    def _split(self, length: int, budget: int) -> tuple[int, int]:
        """The most tokens that can stay so that they and the clusters of the rest are `budget`."""
        for kept in range(budget, 0, -1):
            if kept + self._clusters(length - kept) <= budget:
                return kept, budget - kept
        return 1, budget - 1

    def _pool(self, dropped: int) -> int:
        """Tokens that are clustered."""
        return min(dropped, int(dropped * self.recycle) + 1) if self.recycle and dropped > 0 else 0

    def _clusters(self, dropped: int) -> int:
        pool = self._pool(dropped)
        return int(pool * self.clusters) + 1 if pool else 0

    def _last_places(self, tokens: Tokens, keep: Tensor, counts: Sequence[int]) -> Tensor:
        """The last places that nothing keeps, so that as few tokens as possible give way to what is appended."""
        index = torch.arange(tokens.x.shape[1], device=keep.device).expand(keep.shape[0], -1)
        return topk_keep(index.float(), counts, mask=tokens.mask & (slot_of(keep, tokens.x.shape[1]) < 0))


@register
@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM without recycling, with scores corrected for what distance alone does to attention.

    "SparseVLM+: Visual Token Sparsification with Improved Text-Visual Attention Pattern", version 2.0 of the code of
    SparseVLM (arXiv 2410.04417); written from the code, its paper was not at hand. Before the raters' mean, the
    attention of each head is divided by R_ij, the scaled product of two vectors of ones that were rotated to the
    places i and j ("attention gravity"), and only the `heads` heads count that give visual tokens most. Lists of its
    own; positions stay the original ones.

    R oscillates with the distance and can be near zero or negative, where a quotient says nothing. The default never
    divides by less than `floor` times R at distance 0; `variant="reference"` divides by whatever comes, as the code
    does.

    Args:
        recycle: as in `SparseVLM`; 0: none, as published.
        gravity: whether attention is divided by R.
        heads: heads that count, all where the model has fewer; published: 14, for every model. 0: all.
        floor: least value of R, as a share of its value at distance 0.
    """

    slug = "sparsevlm-plus"
    steps = ("top-k attention of text raters without the pull of distance, in three cuts", "none", "drop")
    tags = frozenset({"query_aware"})
    positions = "original"

    lists: ClassVar[Lists] = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}

    recycle: Annotated[float, Within("[0, 1)", "a share")] = 0.0
    gravity: bool = True
    heads: Annotated[int, Within("[0, inf)", "a number, or 0 for all,")] = 14
    floor: Annotated[float, Within("(0, 1]", "a share")] = 0.1

    @property
    def _attention(self) -> tuple[str, ...]:
        names = ("text_attention_heads", "text_gravity") if self.gravity else ("text_attention_heads",)
        return (*names, "text_attention") if self.rule == "rank" else names

    def score(self, tokens: Tokens) -> Tensor:
        attention = tokens.signal("text_attention_heads").float()
        if self.gravity:
            pull = tokens.signal("text_gravity").float()
            attention = attention / (pull.clamp(min=self.floor) if self.variant == "paper" else pull)[:, None]
        raters = self.raters(tokens)
        attention = attention.masked_fill(~raters[:, None, :, None] | ~tokens.mask[:, None, None], 0)
        by_head = attention.sum(dim=2) / raters.sum(dim=1)[:, None, None]  # [B, H, N]
        count = min(self.heads, by_head.shape[1]) or by_head.shape[1]
        chosen = by_head.sum(dim=2).topk(count, dim=1).indices[..., None]
        return by_head.gather(1, chosen.expand(-1, -1, by_head.shape[2])).mean(dim=1)


def interpolated(points: Sequence[tuple[int, int]], share: float) -> float:
    """The share of tokens at `share`, on straight lines through (0, 0), the points, counted of 576, and (1, 1)."""
    path = [(0.0, 0.0), *((x / TOKENS, y / TOKENS) for x, y in points), (1.0, 1.0)]
    for (left, low), (right, high) in itertools.pairwise(path):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return 1.0


def _best_places(links: Links, kept: Sequence[int], counts: Sequence[int]) -> Int[Tensor, "B C"]:
    """The place of the first of the links of each cluster; the links come best first."""
    width, edges = max(counts), links.slot.shape[1]
    number = links.slot - torch.tensor(list(kept), device=links.slot.device)[:, None]
    index = torch.arange(edges, device=number.device).expand_as(number)
    target = torch.where(links.slot < 0, width, number)
    first = index.new_full((len(counts), width + 1), edges).scatter_reduce(1, target, index, "amin")[:, :width]
    places = links.source.gather(1, first.clamp(max=edges - 1))
    return places.masked_fill(~valid_prefix(counts, width, places.device), -1)
