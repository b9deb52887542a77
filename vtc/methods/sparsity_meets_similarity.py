"""Sparsity Meets Similarity, stage 1: cut the sorted [CLS] similarities where the long tail begins."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtc.errors import SpecError
from vtc.primitives import keep_where, ranks, settled
from vtc.registry import register
from vtc.stages import Method, Paper, Signal, Site, Stage, check_choice
from vtc.tokens import Tokens

NEIGHBOURS = 10
OUTLIER_FACTOR = 1.5

SIGNALS = {"attention": "cls_attention", "cosine": "cls_hidden", "received": "received_attention"}


@register
@dataclass(frozen=True)
class SparsityMeetsSimilarity(Method):
    """Tokens are sorted by their similarity to [CLS], and those before the curve's inflection point stay.

    "Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation in
    Multimodal Large Language Models" (arXiv 2409.01162). Reconstructed from the abstract: it says that similarities
    to [CLS] have a long tail and that the inflection point of the sorted curve decides per sample how many tokens
    stay. Which similarity and which point is ours to choose; the options are named below. The second pruning, by the
    relevance of text in the LLM, is not part of this method yet.

    The number of tokens follows from the content; the budget is a ceiling. Kept tokens stay in raster order.

    Args:
        inflection: "kneedle": the point of the curve farthest from the chord between its ends; "maxdiff2": the
            largest second difference; "lof": as many tokens as there are local outliers among the scores (10
            neighbours, factor above 1.5), which is what a sibling project by some of the authors computes.
        similarity: "attention" of [CLS] at the feature layer, mean over heads (the sibling project: the last layer, all
            heads as one); "cosine" to the hidden state of [CLS]; "received": for towers without [CLS], the attention
            that a token receives from all others.
        least: tokens that always stay.
    """

    slug = "sparsity-meets-similarity"
    paper = Paper(
        "Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation in "
        "Multimodal Large Language Models",
        "2409.01162",
    )
    steps = ("similarity to [CLS] above the inflection point of the sorted curve", "none", "drop")
    fidelity = "reconstructed"
    tags = frozenset({"adaptive", "permutation_equivariant"})
    positions = "compact"

    inflection: str = "kneedle"
    similarity: str = "attention"
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "inflection", ("kneedle", "maxdiff2", "lof"))
        check_choice(self, "similarity", tuple(SIGNALS))
        if self.least < 1:
            raise SpecError(f"least={self.least} of method '{self.slug}': at least 1 token must stay.")

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal(SIGNALS[self.similarity]),)
        return (Stage(Site("tower_out"), self.filter, None, settled(), signals),)

    def filter(self, tokens: Tokens) -> Tensor:
        prefix = tokens.num_prefix
        mask = tokens.mask[:, prefix:]
        if self.similarity == "cosine":
            score = cosine_similarity(tokens.x[:, prefix:].float(), tokens.x[:, :1].float(), dim=-1)
        else:
            score = tokens.signal(SIGNALS[self.similarity]).float()
        count = self.count(score, mask).clamp(min=self.least)
        count = torch.minimum(count, torch.tensor(tokens.budget, device=count.device)[:, None])
        keep = keep_where(mask & (ranks(score, mask) < count), max(tokens.budget))
        return torch.where(keep < 0, -1, keep + prefix)

    def count(self, score: Tensor, mask: Tensor) -> Tensor:
        """Tokens before the inflection point, [B, 1]."""
        n = mask.sum(dim=1, keepdim=True)
        if self.inflection == "lof":
            return self._outliers(score, mask, n)
        curve = score.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True).values
        place = torch.arange(score.shape[1], device=score.device).expand_as(curve)
        last = curve.gather(1, n - 1)
        curve = torch.where(place < n, curve, last)  # a flat tail in place of padding
        if self.inflection == "kneedle":
            height = (curve - last) / (curve[:, :1] - last).clamp(min=torch.finfo(torch.float32).tiny)
            distance = (height + place / (n - 1).clamp(min=1) - 1).abs()
            bend = distance.masked_fill(place >= n, -1).argmax(dim=1, keepdim=True)
        else:
            second = (curve[:, 2:] - 2 * curve[:, 1:-1] + curve[:, :-2]).masked_fill(place[:, 2:] >= n, -torch.inf)
            second = torch.nn.functional.pad(second, (1, 1), value=-torch.inf)  # the ends have none
            bend = second.argmax(dim=1, keepdim=True)
        return bend + 1

    def _outliers(self, score: Tensor, mask: Tensor, n: Tensor) -> Tensor:
        """Scores whose local outlier factor is above 1.5, [B, 1]; neighbours on a line lie in a window of the order."""
        ordered = score.double().masked_fill(~mask, torch.inf).sort(dim=1).values
        place = torch.arange(score.shape[1], device=score.device)[:, None]
        window = place + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, device=score.device)
        missing = (window < 0) | (window == place) | (window >= n[..., None])  # [B, N, 2k + 1]
        window = window.clamp(0, score.shape[1] - 1)
        gap = (ordered[:, window] - ordered[..., None]).abs().masked_fill(missing, torch.inf)
        width = max(1, min(NEIGHBOURS, score.shape[1] - 1, window.shape[1]))
        near, which = gap.sort(dim=2, stable=True)
        near, which = near[..., :width], window.expand_as(which).gather(2, which)[..., :width]
        real = torch.isfinite(near)
        reach = near.masked_fill(~real, 0).amax(dim=2)  # distance of the farthest neighbour

        def of_neighbours(value: Tensor) -> Tensor:
            return value.gather(1, which.flatten(1)).view_as(which)

        count = real.sum(dim=2).clamp(min=1)
        mean_reach = torch.maximum(of_neighbours(reach), near).masked_fill(~real, 0).sum(dim=2) / count
        density = 1 / (mean_reach + 1e-10)
        factor = of_neighbours(density).masked_fill(~real, 0).sum(dim=2) / count / density
        return ((factor > OUTLIER_FACTOR) & (place[:, 0] < n)).sum(dim=1, keepdim=True)
