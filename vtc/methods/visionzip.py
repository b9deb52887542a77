"""VisionZip: dominant tokens by [CLS] attention, the rest merged into a few contextual tokens."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.options import Score, Variant, Within
from vtc.primitives import (
    add_mean,
    assign_nearest,
    join_keep,
    mean_merge,
    rest_of,
    shift,
    topk_keep,
    valid_prefix,
)
from vtc.stages import Links, Method, Paper, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class VisionZip(Method):
    """[CLS] and the tokens it attends to most are kept; the others are merged into uniformly strided targets.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467). Of a budget of K
    tokens some are merged ones (published splits: 162+30, 108+20, 54+10, [CLS] counted in the first number). Targets
    are every (R // C)-th of the R tokens that are not dominant; each other one joins the target with the most similar
    key (mean over heads). [CLS] takes the place of the first dropped token.

    The paper's text merges by averaging; the published code adds the mean of the members to the target, which about
    doubles the size of the feature, and appends the merged tokens behind the dominant ones.

    Args:
        contextual: share of the budget that is merged tokens; 10/64 in the published 64-token setting.
        score: "cls", or "received" for towers without [CLS]: the attention that a token receives from all others.
        variant: "paper" averages and keeps raster order (ours); "reference" is the published code.
    """

    slug = "visionzip"
    paper = Paper("VisionZip: Longer is Better but Not Necessary in Vision Language Models", "2412.04467", "CVPR 2025")
    steps = ("top [CLS] attention, and strided targets of the rest", "the target with the most similar key", "mean")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens enter the LLM: 95.6 % of the full model's average; as copied in VisPruner's "
        "project page"
    )
    tags = frozenset({"merges"})
    positions = "compact"
    defaults = {"llava": 64}  # published settings: 192, 128, 64

    contextual: Annotated[float, Within("[0, 1)", "a share of the budget")] = 10 / 64
    score: Score = "cls"
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        scores = ("cls_attention", "cls_hidden") if self.score == "cls" else ("received_attention",)
        signals = tuple(Signal(name) for name in (*scores, "keys"))
        return (Stage(Site("tower_out"), self.filter, self.correlate, self.compress, signals),)

    def split(self, tokens: Tokens) -> tuple[list[int], list[int]]:
        """Dominant tokens ([CLS] counted) and contextual tokens of each group."""
        contextual = [min(k - 1, round(k * self.contextual)) for k in tokens.budget]
        return [k - c for k, c in zip(tokens.budget, contextual, strict=True)], contextual

    def filter(self, tokens: Tokens) -> Tensor:
        """[CLS] and dominant tokens in raster order, then the targets in raster order."""
        dominant, contextual = self.split(tokens)
        prefix = tokens.num_prefix
        score = tokens.signal("cls_attention" if self.score == "cls" else "received_attention")
        patches = topk_keep(score, [d - prefix for d in dominant], mask=tokens.mask[:, prefix:])
        cls = torch.arange(prefix, device=patches.device).expand(patches.shape[0], -1)
        top = torch.cat([cls, shift(patches, prefix)], dim=1)
        rest = rest_of(top, tokens.ends, dominant, tokens.x.shape[1])
        stride = [max(1, (n - d) // max(c, 1)) for n, d, c in zip(tokens.ends, dominant, contextual, strict=True)]
        place = torch.arange(max(contextual), device=top.device) * torch.tensor(stride, device=top.device)[:, None]
        targets = rest.gather(1, place.clamp(max=max(rest.shape[1] - 1, 0))) if rest.shape[1] else rest
        targets = targets.masked_fill(~valid_prefix(contextual, targets.shape[1], top.device), -1)
        return join_keep(top, targets)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        dominant, _ = self.split(tokens)
        rest = rest_of(keep, tokens.ends, tokens.budget, tokens.x.shape[1])
        is_target = ~valid_prefix(dominant, keep.shape[1], keep.device)
        return assign_nearest(tokens.signal("keys").mean(dim=1), keep, rest, targets=is_target)

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        token_map = (add_mean if self.variant == "reference" else mean_merge)(tokens, keep, links)
        free = rest_of(keep, tokens.ends, tokens.budget, tokens.x.shape[1])
        if tokens.num_prefix and free.shape[1]:
            token_map = replace(token_map, anchor=torch.cat([free[:, :1], token_map.anchor[:, 1:]], dim=1))
        return token_map.in_slot_order() if self.variant == "reference" else token_map.raster()
