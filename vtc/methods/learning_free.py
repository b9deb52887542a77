"""LFTR, image part: average neighbouring tokens, those that are unlike the rest of the image weighing most."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtc.catalogue.registry import register
from vtc.kernels import similarity_degree
from vtc.options import OneOf
from vtc.primitives import grid_cells, topk_keep
from vtc.stages import Links, Method, Paper, Site, Stage, keep_lengths
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class LearningFree(Method):
    """Spatial significance 1 - mean cosine to the other tokens; a significance-weighted average in each grid cell.

    "LFTR: Learning-Free Token Reduction for Multimodal Large Language Models" (arXiv 2501.17391, third version, for
    images). Reconstructed from the abstracts: "significance weights based on differences and similarities between
    frames and patches" is all that is known; no formula was seen, the three versions differ, and no code
    could be had. Ours are the weight, the cells (as many as the budget, nearly equal, on the grid) and the average. The
    temporal part is not here yet. A merged token takes the place of its cell's middle token.

    Args:
        rule: "mean" averages each cell; "top" keeps the budget of most significant tokens and drops the others.
    """

    slug = "learning-free"
    paper = Paper("LFTR: Learning-Free Token Reduction for Multimodal Large Language Models", "2501.17391", "AAAI 2026")
    steps = ("middle token of each cell", "every token to its cell", "average weighted by dissimilarity to the image")
    fidelity = "reconstructed"
    tags = frozenset({"merges"})

    rule: Annotated[str, OneOf("mean", "top")] = "mean"

    def stages(self) -> tuple[Stage, ...]:
        if self.rule == "top":
            return (Stage(Site("llm_in"), self.filter),)
        return (Stage(Site("llm_in"), self.filter, self.correlate, self.compress),)

    def significance(self, tokens: Tokens) -> Tensor:
        """1 - mean cosine similarity to the other tokens of the group, in [0, 2]."""
        return 1 - similarity_degree(tokens.x, mask=tokens.mask, reduce="mean", include_self=False)

    def filter(self, tokens: Tokens) -> Tensor:
        if self.rule == "top":
            return topk_keep(self.significance(tokens), tokens.budget, mask=tokens.mask)
        return grid_cells(tokens)[0]

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        cell = grid_cells(tokens)[1]
        cell = pad(cell, (0, tokens.x.shape[1] - cell.shape[1]), value=-1)
        # identical tokens have no significance at all; the floor makes their average a plain one
        weight = self.significance(tokens).clamp(min=1e-6).masked_fill(cell < 0, 0)
        total = weight.new_zeros(weight.shape[0], keep.shape[1] + 1).scatter_add(1, cell + 1, weight)
        index = torch.arange(tokens.x.shape[1], device=keep.device).expand_as(cell)
        return Links(index, cell, weight / total.gather(1, cell + 1).clamp(min=1e-6))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        assert links is not None
        return TokenMap(keep, keep_lengths(tokens, keep), tokens.x.shape[1], *links)
