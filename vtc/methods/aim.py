"""AIM: merge before the LLM, then drop in every layer of its second half until no visual token is left."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.kernels import bipartite_match
from vtc.options import AtLeastOne, Positive, Variant
from vtc.primitives import (
    attention_pagerank,
    bipartite_keep,
    bipartite_links,
    join_keep,
    keep_where,
    mean_merge,
    shift,
    take_rows,
    topk_keep,
)
from vtc.stages import Links, Method, Paper, Repeat, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens

#: behind layer 14 of 28, and over 8 of the 13 layers that are left
DEPTH, SPAN = 15 / 28, 8 / 13


@register
@dataclass(frozen=True)
class AIM(Method):
    """Bipartite merging of each frame, then PageRank on the attention of each layer decides who goes next.

    "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (arXiv 2412.03248).

    - Before the LLM, tokens of a frame (tile, image) are paired by turns and by the cosine of their features, and the
      best pairs become plain means, at most half of what is left at a time; sizes are not used. Frames are never
      merged together while the budget leaves a token for each. Separators stay.
    - From `layer` on, before each layer, tokens are ranked by PageRank on the causal attention of the layer before:
      5 steps from a uniform start with the softmax at temperature 0.1, root of the mean square over heads. The number
      falls linearly from the budget to 0 at layer `last`. Text stays.

    The budget is what enters the LLM: 25 % for video in the published code, 12.5 % for an image by a digest of the
    paper, whose text was not read. The published code masks tokens in the LLM and computes on; here they are gone.
    There, masked rows go on as queries and start the PageRank with their share, so that scores differ from the second
    cut on, and in the recorded run the 25th of 40 tokens. All frames and images of a sample form one pool in the LLM.
    Attention is taken as causal, also where a model lets image tokens see each other; under a causal mask PageRank
    favours early tokens.

    On the embedded model 39 % of 120 answers are right where 64 tokens enter the LLM and none is left in its last
    layers (`random`: 68 % with 64 tokens in every layer).

    Args:
        layer: first layer that sees fewer tokens; 0: 15 of 28, as a share of the depth.
        last: first layer that sees no visual token; 0: 22 of 28, as a share of the layers from `layer` on.
        prune: False: merge only.
        temperature, iterations: of the PageRank.
        variant: "paper" or "reference": merged tokens of a frame in the order of the published code, unmerged ones by
            falling similarity first. The default leaves them at their places.
    """

    slug = "aim"
    paper = Paper(
        "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        "2412.03248",
        "ICCV 2025",
    )
    steps = ("half of each frame, then top PageRank in each layer", "the most similar token of the other half", "mean")
    fidelity = "golden"
    headline = (
        "LLaVA-OneVision-7B, 32 frames, 25 % of the tokens enter the LLM and fewer each later layer (14.76 of 99.63 "
        "TFLOPs): VideoMME 58.2 (full 58.2); as copied in a digest of the paper"
    )
    tags = frozenset({"merges", "video"})
    positions = "compact"
    at = "layer"
    defaults = {"llava": 0.125, "llava_onevision": 0.25}  # a third-party digest of the paper; its code

    layer: int = 0
    last: int = 0
    prune: bool = True
    temperature: Positive = 0.1
    iterations: AtLeastOne = 5
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 0 or self.last < 0 or (self.last and not 0 < self.layer <= self.last):
            raise SpecError(
                f"layer={self.layer}, last={self.last} of method {self.slug!r}: decoder layers from 1 on, last after "
                "layer and not without it."
            )

    def stages(self) -> tuple[Stage, ...]:
        merge = Stage(Site("llm_in"), every, None, self.compress)
        names = ("sequence_queries", "sequence_keys", "sequence_valid", "sequence_row")
        site = Site("layer", self.layer or DEPTH)
        signals = tuple(Signal(name) for name in names)
        prune = Stage(site, self.rank, signals=signals, pool="sample", schedule=Repeat(self.pace))
        return (merge, prune) if self.prune else (merge,)

    def pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay before layer number `step` of `steps`, counted from the first cut."""
        cuts = self.last - self.layer + 1 if self.last else max(1, round(SPAN * steps))
        return int(budget * max(0.0, 1.0 - (step + 1) / cuts))

    def rank(self, tokens: Tokens) -> Tensor:
        """The filter in the LLM."""
        score = attention_pagerank(
            tokens.signal("sequence_queries"),
            tokens.signal("sequence_keys"),
            tokens.signal("sequence_valid"),
            temperature=self.temperature,
            steps=self.iterations,
        )
        score = score.gather(1, tokens.signal("sequence_row").clamp(min=0))
        return topk_keep(score, tokens.budget, mask=tokens.mask)

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        """Every frame merged by itself; where there are more frames than places, all tokens of the group together.

        Each matching splits what the one before left anew, so that filter and correlate take turns in here.
        """
        frame, counts = _frames(tokens)
        alone = [sum(c > 0 for c in row) + apart <= k for (*row, apart), k in zip(counts, tokens.budget, strict=True)]
        together = torch.tensor([not a for a in alone], device=frame.device)[:, None]
        frame = torch.where(together, torch.where(tokens.mask, 0, -1), frame)
        sizes, budget, apart = [], [], []
        for (*row, separators), n, k, is_alone in zip(counts, tokens.lengths, tokens.budget, alone, strict=True):
            row = row if is_alone else [n, *(0 for _ in row[1:])]
            apart.append(separators if is_alone else 0)
            sizes += row
            budget += _shared(k - apart[-1], row)
        member = frame[:, None] == torch.arange(len(sizes) // len(alone), device=frame.device)[:, None]  # [B, F, N]
        table = keep_where(member.flatten(0, 1), max(sizes))
        owner = torch.arange(len(alone), device=frame.device).repeat_interleave(member.shape[1])
        x = take_rows(tokens.x[owner], table)
        token_map = _halved(Tokens(x, tuple(sizes), budget=tuple(budget)))
        if self.variant == "reference":
            token_map = token_map.in_slot_order()
        return _side_by_side(tokens, token_map, table, frame < 0, apart)


def every(tokens: Tokens) -> Tensor:
    """All tokens."""
    return TokenMap.identity(tokens.lengths, tokens.x.device).anchor


def _frames(tokens: Tokens) -> tuple[Tensor, list[list[int]]]:
    """[B, N] the frame of each token, -1 for separators and padding; how many each frame has, separators last."""
    layout = tokens.layout
    if layout is None:
        return torch.where(tokens.mask, 0, -1), [[n, 0] for n in tokens.lengths]
    number = max(len(grids) for grids in layout.grids)
    frame = torch.where(tokens.mask & (layout.row >= 0), layout.segment, -1)
    place = torch.where(tokens.mask, frame % (number + 1), number + 1)
    found = frame.new_zeros(frame.shape[0], number + 2).scatter_add(1, place, torch.ones_like(place))
    return frame, found[:, :-1].tolist()


def _shared(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`, at least one for each that is not empty, never more than it has."""
    spare = [0, *itertools.accumulate(max(0, n - 1) for n in sizes)]
    rest = total - sum(n > 0 for n in sizes)
    ends = [end * rest // max(1, spare[-1]) for end in spare]
    return [int(n > 0) + high - low for n, (low, high) in zip(sizes, itertools.pairwise(ends), strict=True)]


def _halved(tokens: Tokens) -> TokenMap:
    """Matchings of what is left, until each group holds its budget."""
    token_map = TokenMap.identity(tokens.lengths, tokens.x.device)
    left = tokens
    while left.lengths != tokens.budget:
        merged = [min(n // 2, n - k) for n, k in zip(left.lengths, tokens.budget, strict=True)]
        kept = tuple(n - m for n, m in zip(left.lengths, merged, strict=True))
        metric = left.x.float()
        value, _ = bipartite_match(metric, mask=left.mask)
        keep = bipartite_keep(left, value, merged)
        halves = mean_merge(replace(left, budget=kept), keep, bipartite_links(left, metric, keep, kept))
        token_map = token_map.then(halves)
        left = Tokens(halves.apply(left.x), kept, budget=tokens.budget)
    return token_map


def _side_by_side(tokens: Tokens, frames: TokenMap, table: Tensor, is_apart: Tensor, apart: Sequence[int]) -> TokenMap:
    """The maps of the frames of each group (their tokens are in `table`) as one map, in which separators stay."""
    batch, number = len(tokens.lengths), len(frames.lengths) // len(tokens.lengths)
    rows = [frames.lengths[b * number : (b + 1) * number] for b in range(batch)]
    starts = [[0, *itertools.accumulate(row)] for row in rows]
    first = torch.tensor([row[:-1] for row in starts], device=table.device).flatten()[:, None]
    assert frames.source is not None and frames.slot is not None and frames.weight is not None
    source = table.gather(1, frames.source.clamp(min=0)).clamp(min=0).view(batch, -1)
    slot = shift(frames.slot, first).view(batch, -1)
    anchor = table.gather(1, frames.anchor.clamp(min=0)).masked_fill(frames.anchor < 0, -1).view(batch, -1)
    separators = keep_where(is_apart & tokens.mask, max(apart))
    place = torch.arange(separators.shape[1], device=table.device)
    merged = torch.tensor([row[-1] for row in starts], device=table.device)[:, None]
    lengths = tuple(row[-1] + extra for row, extra in zip(starts, apart, strict=True))
    token_map = TokenMap(
        join_keep(anchor, separators)[:, : max(lengths)],
        lengths,
        tokens.x.shape[1],
        source=torch.cat([source, separators.clamp(min=0)], dim=1),
        slot=torch.cat([slot, torch.where(separators < 0, -1, place + merged)], dim=1),
        weight=torch.cat([frames.weight.view(batch, -1), (separators >= 0).float()], dim=1),
    )
    return token_map.raster()
