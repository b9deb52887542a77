"""FoPru: keep the tokens, or the rows of the grid, that receive most attention in the encoder."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import InputError
from vtc.options import OneOf, Score
from vtc.primitives import ranks, topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class FoPru(Method):
    """Rank strategy: the most significant tokens of the image. Row strategy: the most significant rows of the grid.

    "FoPru: Focal Pruning for Efficient Large Vision-Language Models" (arXiv 2411.14164). Reconstructed from the
    abstract: it names the two strategies, the significance "derived from the vision encoder" and the return to the
    original order, and gives no formula. Ours are: significance is the attention that a token receives from all
    tokens of the feature layer, mean over heads; a row counts with the mean of its tokens; rows of different crops
    compete with each other. Where the budget is no multiple of the row length, the last row that is kept is cut to
    its most significant tokens, so that the budget is met exactly. With `score="cls"` the rank strategy is FasterVLM.
    Kept tokens stay in raster order; contiguous positions, as in LLaVA's own indexing, are an assumption too.

    Args:
        strategy: "rank" or "row".
        score: "received" or "cls", the two readings of the abstract's "attention-based token significance".
    """

    slug = "fopru"
    paper = Paper("FoPru: Focal Pruning for Efficient Large Vision-Language Models", "2411.14164")
    steps = ("top-k received attention, by token or by row of the grid", "none", "drop")
    fidelity = "reconstructed"
    headline = (
        "model not named, 25 % of the tokens enter the LLM: within 1 % of the full model on several benchmarks; as "
        "copied in a digest of the paper"
    )
    tags = frozenset({"permutation_equivariant"})
    positions = "compact"
    defaults = {"llava": 0.25}  # a third-party digest: 25 % kept

    strategy: Annotated[str, OneOf("rank", "row")] = "rank"
    score: Score = "received"

    @property
    def signal(self) -> str:
        return "cls_attention" if self.score == "cls" else "received_attention"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("tower_out"), self.filter, signals=(Signal(self.signal),)),)

    def filter(self, tokens: Tokens) -> Tensor:
        score = tokens.signal(self.signal).float()
        if self.strategy == "rank":
            return topk_keep(score, tokens.budget, mask=tokens.mask)
        row_place = self._row_places(tokens, score)
        place = ranks(-(row_place * score.shape[1] + ranks(score, tokens.mask)))
        return topk_keep(-place.float(), tokens.budget, mask=tokens.mask)

    def _row_places(self, tokens: Tokens, score: Tensor) -> Tensor:
        """For each token the place of its row among all rows of the group; separators, in no row, come last."""
        layout = tokens.layout
        if layout is None:
            raise InputError("strategy='row' of method 'fopru' needs tokens on a grid. Use strategy='rank' here.")
        height = max(h for grids in layout.grids for h, _ in grids)
        rows = height * max(len(grids) for grids in layout.grids)
        row = torch.where((layout.row < 0) | ~tokens.mask, rows, layout.segment * height + layout.row)
        total = score.new_zeros(score.shape[0], rows + 1).scatter_add(1, row, score)[:, :-1]
        count = score.new_zeros(score.shape[0], rows + 1).scatter_add(1, row, torch.ones_like(score))[:, :-1]
        place = ranks(total / count.clamp(min=1), count > 0)
        return torch.cat([place, torch.full_like(place[:, :1], rows)], dim=1).gather(1, row)
