"""TokenCorr: tokens sampled by early [CLS], more where patterns repeat less, and the outliers of deep [CLS]."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import similarity_degree
from vtc.options import AtLeastOne, OneOf
from vtc.primitives import at_most, keep_where, quantile, ranks, seeded_uniform, settled
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class TokenCorr(Method):
    """Local information in a number that follows from pattern repetitiveness, and global information by outliers.

    "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding" (arXiv 2407.14439).
    Reconstructed from the abstract, the repository's figure and public reviews; there is no code and no formula.
    Seen: patches whose keys in a low encoder layer resemble many others are redundant, and the share of the others is
    the information density of the crop; that share decides how many tokens are sampled by the low layer's [CLS]
    attention; outliers of a deep layer's [CLS] attention (interquartile rule) are added; features are those of the
    last layer. Ours: both thresholds, the low layer, sampling without replacement, the multiple 1.5, the plain union
    (the figure says "aggregation"), raster order.

    The number of tokens follows from the content. The budget is a ceiling: above it outliers stay first, by deep
    attention, then sampled tokens in the order in which they were drawn. Crops of the same length draw the same
    random numbers.

    Args:
        threshold: cosine similarity from which two keys count as alike.
        repeats: alike patches from which a patch is redundant.
        low: block of the tower, 0-based, whose keys and [CLS] attention describe patterns.
        outlier: multiple of the interquartile range above the third quartile.
        sample: "random", or "top" for the most probable tokens.
        seed: seed of the local generator.
    """

    slug = "tokencorr"
    paper = Paper(
        "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding", "2407.14439"
    )
    steps = ("[CLS] sampling as dense as patterns do not repeat, and outliers of deep [CLS] attention", "none", "drop")
    fidelity = "reconstructed"
    tags = frozenset({"adaptive", "random"})
    positions = "compact"

    threshold: float = 0.7
    repeats: AtLeastOne = 1
    low: int = 0
    outlier: float = 1.5
    sample: Annotated[str, OneOf("random", "top")] = "random"
    seed: int = 0

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("low_keys", layer=self.low), Signal("cls_attention_layers"), Signal("cls_attention"))
        return (Stage(Site("tower_out"), self.filter, None, settled(), signals),)

    def filter(self, tokens: Tokens) -> Tensor:
        drawn = self._draw_order(tokens)
        is_local = tokens.mask & (drawn < self.density(tokens))
        deep = tokens.signal("cls_attention").float()
        low, high = (quantile(deep, q, tokens.mask) for q in (0.25, 0.75))
        is_global = tokens.mask & (deep > high + self.outlier * (high - low))
        # attention is at most 1, so that any outlier comes before any sampled token
        score = torch.where(is_global, deep + 1, -drawn.float())
        return keep_where(at_most(score, is_local | is_global, tokens.budget), max(tokens.budget))

    def density(self, tokens: Tokens) -> Tensor:
        """How many tokens of each group are not redundant, at least 1, [B, 1]."""
        keys = tokens.signal("low_keys").transpose(1, 2).flatten(2)  # heads side by side
        alike = similarity_degree(keys, mask=tokens.mask, reduce="count", threshold=self.threshold, include_self=False)
        return (tokens.mask & (alike < self.repeats)).sum(dim=1, keepdim=True).clamp(min=1)

    def _draw_order(self, tokens: Tokens) -> Tensor:
        """Place of each token in a draw without replacement by the low layer's [CLS] attention."""
        tiny = torch.finfo(torch.float32).tiny
        chance = tokens.signal("cls_attention_layers")[:, self.low].float().clamp(min=tiny).log()
        if self.sample == "random":
            # the largest of log p + Gumbel noise are a sample without replacement
            chance = chance - (-seeded_uniform(tokens, self.seed).clamp(min=tiny).log()).log()
        return ranks(chance, tokens.mask)
