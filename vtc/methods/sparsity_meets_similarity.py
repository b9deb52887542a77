"""Sparsity Meets Similarity: cut sorted similarities, to [CLS] and then to the text, where the long tail begins."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vtc.catalogue.registry import register
from vtc.options import AtLeastOne, OneOf, Within
from vtc.primitives import instruction, keep_where, ranks, settled, shift
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens

NEIGHBOURS = 10
OUTLIER_FACTOR = 1.5

SIGNALS = {"attention": "cls_attention", "cosine": "cls_hidden", "received": "received_attention"}


@register
@dataclass(frozen=True)
class SparsityMeetsSimilarity(Method):
    """Tokens are sorted by their similarity to [CLS], then to the text; those before the curve's inflection point stay.

    "Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation in
    Multimodal Large Language Models" (arXiv 2409.01162). Reconstructed from the abstract: it says that similarities
    to [CLS] have a long tail and that the inflection point of the sorted curve decides per sample how many tokens
    stay, and that a second pruning follows by the interaction of visual tokens and text. Which similarity, which point
    and where the second pruning happens is ours to choose; the options are named below. It acts on the LLM's input, on
    the cosine similarity of a visual token to the text behind the image; a prompt without text keeps its tokens.

    The number of tokens follows from the content; the budget is a ceiling. Kept tokens stay in raster order. On the
    embedded model 14 of 576 tokens are left on average under a ceiling of 64, with 59 % of 120 answers right (`random`:
    68 % with 64 tokens, 53 % with 32); see `benchmarks/bench-scenes.json`.

    Args:
        inflection: "kneedle": the point of the curve farthest from the chord between its ends; "maxdiff2": the
            largest second difference; "lof": as many tokens as there are local outliers among the scores (10
            neighbours, factor above 1.5), which is what a sibling project by some of the authors computes.
        similarity: "attention" of [CLS] at the feature layer, mean over heads (the sibling project: the last layer, all
            heads as one); "cosine" to the hidden state of [CLS]; "received": for towers without [CLS], the attention
            that a token receives from all others.
        least: tokens that always stay.
        stage: "both", or "1" or "2" alone.
        relevance: of the similarities to the text tokens the "max" or the "mean".
        second_ratio: share of the tokens that stays in stage 2; 0: the same inflection point as in stage 1.
    """

    slug = "sparsity-meets-similarity"
    paper = Paper(
        "Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation in "
        "Multimodal Large Language Models",
        "2409.01162",
    )
    steps = ("similarity to [CLS], then to the text, above the inflection point of the sorted curve", "none", "drop")
    fidelity = "reconstructed"
    headline = (
        "22 % of the tokens on average at a performance comparable to the full model's (no metric was read); the "
        "abstract"
    )
    tags = frozenset({"adaptive", "query_aware", "permutation_equivariant"})
    positions = "compact"

    inflection: Annotated[str, OneOf("kneedle", "maxdiff2", "lof")] = "kneedle"
    similarity: Annotated[str, OneOf(*SIGNALS)] = "attention"
    least: AtLeastOne = 1
    stage: Annotated[str, OneOf("both", "1", "2")] = "both"
    relevance: Annotated[str, OneOf("max", "mean")] = "max"
    second_ratio: Annotated[float, Within("[0, 1]", "a share, or 0 for the inflection point,")] = 0.0

    def stages(self) -> tuple[Stage, ...]:
        first = Stage(Site("tower_out"), self.filter, None, settled(), (Signal(SIGNALS[self.similarity]),))
        text = (Signal("text_embeds"), Signal("text_after"))
        second = Stage(Site("llm_in"), self.by_text, None, settled(), text)
        return {"1": (first,), "2": (second,), "both": (first, second)}[self.stage]

    def filter(self, tokens: Tokens) -> Tensor:
        prefix = tokens.num_prefix
        mask = tokens.mask[:, prefix:]
        if self.similarity == "cosine":
            score = cosine_similarity(tokens.x[:, prefix:].float(), tokens.x[:, :1].float(), dim=-1)
        else:
            score = tokens.signal(SIGNALS[self.similarity]).float()
        keep = self._head(score, mask, self.count(score, mask), tokens)
        return shift(keep, prefix)

    def by_text(self, tokens: Tokens) -> Tensor:
        """Stage 2, [B, K]."""
        is_text, mask = instruction(tokens), tokens.mask
        text = normalize(tokens.signal("text_embeds").float(), dim=-1)
        cosine = normalize(tokens.x.float(), dim=-1) @ text.transpose(1, 2)
        if self.relevance == "max":
            score = cosine.masked_fill(~is_text[:, None], -1).amax(dim=2)
        else:
            score = cosine.masked_fill(~is_text[:, None], 0).sum(dim=2) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
        n = mask.sum(dim=1, keepdim=True)
        count = (n * self.second_ratio).long() if self.second_ratio else self.count(score, mask)
        count = torch.where(is_text.any(dim=1, keepdim=True), count, n)
        return self._head(score, mask, count, tokens)

    def _head(self, score: Tensor, mask: Tensor, count: Tensor, tokens: Tokens) -> Tensor:
        """The best `count` tokens of each group, within floor and ceiling."""
        count = count.clamp(min=self.least)
        count = torch.minimum(count, torch.tensor(tokens.budget, device=count.device)[:, None])
        return keep_where(mask & (ranks(score, mask) < count), max(tokens.budget))

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
