"""Control: average pooling on the grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.primitives import grid_cells, mean_merge
from vtc.stages import Links, Method, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class Pool(Method):
    """Average of the projected features in each of `budget` grid cells, at the place of the cell's middle token."""

    slug = "pool"
    steps = ("middle token of each cell", "every token to its cell", "mean of the cell")
    fidelity = "control"
    tags = frozenset({"merges"})

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("llm_in"), self.filter, self.correlate, mean_merge),)

    def filter(self, tokens: Tokens) -> Tensor:
        return grid_cells(tokens)[0]

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        cell = grid_cells(tokens)[1]
        cell = torch.nn.functional.pad(cell, (0, tokens.x.shape[1] - cell.shape[1]), value=-1)
        index = torch.arange(tokens.x.shape[1], device=keep.device).expand_as(cell)
        is_middle = torch.zeros(keep.shape[0], tokens.x.shape[1] + 1, dtype=torch.bool, device=keep.device)
        is_middle = is_middle.scatter(1, torch.where(keep < 0, tokens.x.shape[1], keep), True)[:, :-1]
        slot = cell.masked_fill(is_middle, -1)  # the middle token is already in its slot
        return Links(index, slot, (slot >= 0).float())
