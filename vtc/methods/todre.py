"""ToDRE, stage 1: keep the tokens that are least like those already kept, starting at a pivot."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtc.kernels import farthest_point, max_sum
from vtc.primitives import ascending, valid_prefix
from vtc.registry import register
from vtc.stages import Method, Paper, Signal, Site, Stage, check_choice
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy diversity of the LLM's input features: each pick has the smallest summed cosine to those before it.

    "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757, version 2). The
    first pick is the token that [CLS] attends to most in the tower's last layer. No official code exists. The first
    version's abstract speaks of greedy k-center, which `objective` offers. All crops of an image and all frames of a
    video form one pool. Output order and positions are not stated: tokens stay in raster order with their original
    positions.

    This is stage 1 only. Stage 2, which removes all visual tokens in a late decoder layer when the text no longer
    attends to them, comes later.

    Args:
        objective: "max_sum" (algorithm 1 of version 2) or "k_center" (wording of version 1).
        pivot: first pick; "cls", or for towers without [CLS] "random" (the paper's advice, drawn with `seed`), or the
            token "nearest" to or "farthest" from the mean feature (its ablation; by cosine, our choice).
        thumbnail: whether the "cls" pivot comes from the first segment alone, the thumbnail of AnyRes; False looks in
            all of them, as the paper does for videos.
        layer: layer of the [CLS] attention, counted from the feature layer; 1 is the last layer of LLaVA's tower.
    """

    slug = "todre"
    paper = Paper("ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", "2505.18757")
    steps = ("max-sum dispersion from the token [CLS] attends to most", "none", "drop")
    fidelity = "paper"

    objective: str = "max_sum"
    pivot: str = "cls"
    thumbnail: bool = True
    layer: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "objective", ("max_sum", "k_center"))
        check_choice(self, "pivot", ("cls", "random", "nearest", "farthest"))

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("cls_attention", layer=self.layer),) if self.pivot == "cls" else ()
        return (Stage(Site("llm_in"), self.filter, signals=signals),)

    def picks(self, tokens: Tokens) -> Tensor:
        """The tokens in the order in which they are picked, [B, K]."""
        select = max_sum if self.objective == "max_sum" else farthest_point
        return select(tokens.x, max(tokens.budget), mask=tokens.mask, start=self._pivot(tokens))

    def filter(self, tokens: Tokens) -> Tensor:
        picks = self.picks(tokens)
        return ascending(picks.masked_fill(~valid_prefix(tokens.budget, picks.shape[1], picks.device), -1))

    def _pivot(self, tokens: Tokens) -> Tensor:
        if self.pivot == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.rand((), generator=generator, dtype=torch.float64)  # groups of equal length share their pivot
            return (drawn * torch.tensor(tokens.lengths)).long().to(tokens.x.device)
        candidates = tokens.mask
        if self.pivot == "cls":
            score = tokens.signal("cls_attention").float()
            if self.thumbnail and tokens.layout is not None:
                candidates = candidates & (tokens.layout.segment == 0)
        else:
            x = tokens.x.float() * tokens.mask[..., None]
            score = cosine_similarity(x, x.sum(dim=1, keepdim=True), dim=-1)
            score = score if self.pivot == "nearest" else -score
        return score.masked_fill(~candidates, -torch.inf).argmax(dim=1)
