"""PromptDistill: keep the tokens that the prompt's last token asks for in a middle layer, and shrink earlier caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d

from vtc.catalogue.registry import register
from vtc.errors import InputError, SpecError
from vtc.options import Ascending, OneOf, Variant
from vtc.primitives import geometric_pace, topk_keep
from vtc.stages import Drop, Method, Paper, Schedule, Signal, Site, Stage
from vtc.tokens import Budget, Tokens

#: behind layer 13 of 32
DEPTH = 14 / 32
#: tokens in a row, or on each side of a square, that share their scores
LINE, SQUARE = 5, 3


@register
@dataclass(frozen=True)
class PromptDistill(Method):
    """Top-k of the raw scaled logits of the last query row, smoothed over neighbours; optionally in earlier caches too.

    "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language Model
    Inference" (arXiv 2503.23274), a method for text. Here the candidates are the visual tokens; all text stays. Logits
    q . k / sqrt(d) of the prompt's last token, mean over heads and without a softmax, are averaged over neighbours, and
    the k best tokens go on. With several layers each stage scores what the one before left. Positions stay the original
    ones, in the decode steps also when caches were cut. All images of a sample form one pool.

    With several layers the published commands name a count for each; without `counts` the same share of what is left
    goes at each, down to the budget.

    Args:
        layers: layers from which on fewer tokens are seen (0-based); (): 14 of 32, as a share of the depth.
        counts: tokens that stay in each stage instead of the budget, which then, if there is one, is the least.
        pool: neighbours that share their scores: "line": 5 in the order of the prompt (published); "grid": 3 x 3 on the
            image, which is not in the paper; "none".
        truncate_cache: stages, from the first, whose choice is also made in the caches of the layers before it, back
            to the stage before; -1: all of them, 0: none.
        variant: "paper", where neighbours that do not exist do not count (ours: of the paper the abstract was read), or
            "reference": they count as logits of 0, as in the published code, which moves scores at the borders towards
            0.
    """

    slug = "promptdistill"
    paper = Paper(
        "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language "
        "Model Inference",
        "2503.23274",
    )
    steps = ("top-k pooled logits of the last query row in a middle layer", "none", "drop")
    fidelity = "golden"
    headline = (
        "text, no number for images was read: 1 to 5 % better overall than GemFilter, at a budget that was not read; "
        "the abstract"
    )
    tags = frozenset({"query_aware"})
    at = "layers"

    layers: Annotated[tuple[int, ...], Ascending()] = ()
    counts: tuple[int, ...] = ()
    pool: Annotated[str, OneOf("line", "grid", "none")] = "line"
    truncate_cache: int = 0
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = len(self.layers or (DEPTH,))
        if self.counts and (len(self.counts) != number or any(count < 1 for count in self.counts)):
            raise SpecError(
                f"counts={self.counts} of method {self.slug!r}: a number from 1 on for each of {number} stages."
            )
        if not -1 <= self.truncate_cache <= number:
            raise SpecError(
                f"truncate_cache={self.truncate_cache} of method {self.slug!r}: 0 (none), -1 (all) or a number of "
                f"stages up to {number}."
            )

    def stages(self) -> tuple[Stage, ...]:
        layers = self.layers or (DEPTH,)
        budget = Budget(tokens=1) if self.counts and self.budget is None else None
        cut = len(layers) if self.truncate_cache < 0 else self.truncate_cache
        return tuple(
            Stage(
                Site("layer", layer),
                self.filter,
                signals=(Signal("query_logits"),),
                pool="sample",
                budget=budget,
                schedule=self._schedule(stage, len(layers)),
                leave=Drop(evict=before) if stage < cut else Drop(),
            )
            for stage, (before, layer) in enumerate(zip((0, *layers), layers, strict=False))
        )

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(self.score(tokens), tokens.budget, mask=tokens.mask)

    def score(self, tokens: Tokens) -> Float[Tensor, "B N"]:
        """Logits, averaged over neighbours."""
        logits = tokens.signal("query_logits").float()
        if self.pool == "none":
            return logits
        if self.pool == "line":
            return self._mean(logits.masked_fill(~tokens.mask, 0), tokens.mask, _line)
        layout = tokens.layout
        if layout is None:
            raise InputError("pool='grid' of method 'promptdistill' needs tokens on a grid. Use pool='line' here.")
        height, width = (max(side) + 2 for side in zip(*(g for grids in layout.grids for g in grids), strict=True))
        segments = max(len(grids) for grids in layout.grids)
        on_grid = tokens.mask & (layout.row >= 0)
        # every segment on a board of its own, with an empty rim
        place = (layout.segment * height + layout.row + 1) * width + layout.col + 1
        place = torch.where(on_grid, place, segments * height * width)

        def spread(value: Tensor) -> Tensor:
            board = value.new_zeros(value.shape[0], segments * height * width + 1).scatter(1, place, value)
            pooled = avg_pool2d(board[:, :-1].view(-1, segments, height, width), SQUARE, stride=1, padding=SQUARE // 2)
            return pooled.flatten(1).gather(1, place.clamp(max=segments * height * width - 1))

        # separators lie in no square and keep their own score
        return torch.where(on_grid, self._mean(logits.masked_fill(~on_grid, 0), on_grid, spread), logits)

    def _mean(self, values: Tensor, there: Bool[Tensor, "B N"], spread: Callable[[Tensor], Tensor]) -> Tensor:
        """`values`, 0 where there is no token, after `spread`, a mean over places."""
        if self.variant == "reference":
            return spread(values)
        return spread(values) / spread(there.float()).clamp(min=torch.finfo(torch.float32).tiny)

    def _schedule(self, stage: int, stages: int) -> Schedule:
        """Tokens that stay after stage number `stage` (from 0)."""
        if self.counts:
            return lambda n, k: max(k, self.counts[stage])
        return lambda n, k: geometric_pace(n, k, stage, stages)


def _line(values: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Mean over places in a row."""
    return avg_pool1d(values[:, None], LINE, stride=1, padding=LINE // 2)[:, 0]
