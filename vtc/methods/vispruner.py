"""VisPruner: tokens that [CLS] looks at, and of the others those without a duplicate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.options import Score, Share
from vtc.primitives import ascending, distinct_of, join_keep, valid_prefix
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class VisPruner(Method):
    """A share of the budget by [CLS] attention, the rest by removing duplicates among the remaining tokens in rounds.

    "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv 2412.01818, the
    new version of FasterVLM's report). Each round splits the remaining tokens, sorted by descending attention, into
    even and odd places and drops the 8 even ones with the most similar odd one (cosine of the tower's features). Kept
    tokens stay in raster order; the published code renumbers positions (`positions="compact"`). Budgets count each
    image (each crop with AnyRes).

    The published code fails when an odd number of tokens remains or fewer than 8 are to be found; here an odd list
    has one more even place, and a round never drops more than there are pairs.

    Args:
        important: share of the budget that goes to attention; 0.5 in the published code.
        score: "cls", or "received" for towers without [CLS]: the attention that a token receives from all others, the
            authors' advice for such towers.
    """

    slug = "vispruner"
    paper = Paper(
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        "2412.01818",
        "ICCV 2025",
    )
    steps = ("top [CLS] attention, and the rest without its duplicates", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens enter the LLM: 96.6 % of the full model's average over 10 benchmarks; the "
        "authors' project page"
    )
    positions = "compact"
    defaults = {"llava": 128}  # project page: 128, 64, 32

    important: Share = 0.5
    score: Score = "cls"

    @property
    def signal(self) -> str:
        return "cls_attention" if self.score == "cls" else "received_attention"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("tower_out"), self.filter, signals=(Signal(self.signal),)),)

    def filter(self, tokens: Tokens) -> Tensor:
        score = tokens.signal(self.signal).float().masked_fill(~tokens.mask, -torch.inf)
        order = score.sort(dim=1, descending=True, stable=True).indices
        important = [int(k * self.important) for k in tokens.budget]
        rest = [n - i for n, i in zip(tokens.lengths, important, strict=True)]
        diverse = [k - i for k, i in zip(tokens.budget, important, strict=True)]
        top = order[:, : max(important)]
        top = top.masked_fill(~valid_prefix(important, top.shape[1], top.device), -1)
        place = torch.arange(max(rest), device=order.device) + torch.tensor(important, device=order.device)[:, None]
        others = order.gather(1, place.clamp(max=order.shape[1] - 1))
        distinct = distinct_of(tokens.x, others, rest, diverse)
        return ascending(join_keep(top, distinct))[:, : max(tokens.budget)]
