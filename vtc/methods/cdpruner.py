"""CDPruner: the tokens that are diverse given the question, by a conditional determinantal point process."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.catalogue.registry import register
from vtc.kernels import dpp_map_features
from vtc.options import OneOf, Variant, Within
from vtc.primitives import ascending, valid_prefix
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy MAP of a DPP whose kernel is relevance_i * cosine_ij * relevance_j on the LLM's input features.

    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv 2506.10967).
    Relevance is the *negated* cosine of a patch and the question in CLIP's joint space (dense CLIP patches are
    anti-correlated with matching text), mean over the text's segments of 77 tokens, scaled to [0, 1]. Kept tokens stay
    in raster order; the published code renumbers positions (`positions="compact"`).

    The published code scales relevance by the minimum and maximum of the whole batch, so that images change each
    other's result; the default scales each group by itself. It runs once per crop with AnyRes; here the crops of one
    image are one group, and separators, of which CLIP knows nothing, are least relevant. A token that is a combination
    of earlier picks (a budget above the rank of the features) yields NaN there; here it is picked last and changes
    nothing.

    Args:
        relevance: "clip" as published; it needs CLIP's text tower, which stock vision-language models do not have, so
            it comes with `vtc.patch(..., companion=vtc.ClipCompanion(clip, tokenizer, processor))`.
            "llm": plus the mean cosine of the LLM's input embeddings of patch and text, the idea of a published port
            for towers without a text side (no vectors to compare with).
        theta: in (0, 1) relevance becomes exp(theta / (2 (1 - theta)) * relevance), a line that is commented out in
            the published code; 0: as it is.
        variant: "paper" or "reference" (scaling over the whole batch).
    """

    slug = "cdpruner"
    paper = Paper(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
        "2506.10967",
        "NeurIPS 2025",
    )
    steps = ("greedy MAP of a DPP with the question's relevance as quality", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens enter the LLM: 97.0 % of the full model's average; the authors' project page"
    )
    requires = "CLIP's text tower and projections (`companion=`)"
    tags = frozenset({"query_aware", "permutation_equivariant"})
    positions = "compact"
    defaults = {"llava": 128}  # project page: 128, 64, 32

    relevance: Annotated[str, OneOf("clip", "llm")] = "clip"
    theta: Annotated[float, Within("[0, 1)")] = 0.0
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        names = ("clip_image_embeds", "clip_text_embeds") if self.relevance == "clip" else ("text_embeds",)
        return (Stage(Site("llm_in"), self.filter, signals=tuple(Signal(name) for name in names)),)

    def quality(self, tokens: Tokens) -> Tensor:
        """Relevance of each token to the question, in [0, 1] before `theta`, [B, N]."""
        if self.relevance == "clip":
            text = tokens.signal("clip_text_embeds")
            cosine = -self._mean_cosine(tokens.signal("clip_image_embeds"), text, (text != 0).any(dim=-1))
        else:
            cosine = self._mean_cosine(tokens.x, tokens.signal("text_embeds"), tokens.signal("text_mask"))
        known = tokens.mask
        if self.relevance == "clip":  # a separator has no patch
            known = known & (tokens.signal("clip_image_embeds") != 0).any(dim=-1)
        dim = (0, 1) if self.variant == "reference" else (1,)
        low = cosine.masked_fill(~known, torch.inf).amin(dim=dim, keepdim=True)
        high = cosine.masked_fill(~known, -torch.inf).amax(dim=dim, keepdim=True)
        # equal relevance everywhere (no text, one token) is plain diversity
        relevance = (cosine - low + 1e-6) / (high - low).clamp(min=1e-6)
        relevance = torch.where(known.any(dim=1, keepdim=True), relevance.masked_fill(~known, 0.0), 1.0)
        return relevance if self.theta == 0.0 else (self.theta / (2 * (1 - self.theta)) * relevance).exp()

    def filter(self, tokens: Tokens) -> Tensor:
        picks = dpp_map_features(tokens.x, self.quality(tokens), max(tokens.budget), mask=tokens.mask)
        return ascending(picks.masked_fill(~valid_prefix(tokens.budget, picks.shape[1], picks.device), -1))

    def _mean_cosine(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Mean cosine of each row of `image` with the valid rows of `text`, which is one product with their mean."""
        units = normalize(text.float(), dim=-1) * text_mask[..., None]
        mean = units.sum(dim=1) / text_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bnd,bd->bn", normalize(image.float(), dim=-1), mean)
