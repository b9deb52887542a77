"""GreedyPrune: tokens in the order of their saliency, without those too similar to one already kept."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.catalogue.registry import register
from vtc.options import OneOf, Within
from vtc.primitives import ascending, take_rows, unlike_picks, valid_prefix
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class GreedyPrune(Method):
    """Greedy maximum of summed saliency under the constraint that kept tokens are pairwise unlike.

    "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models" (arXiv 2506.13166).
    Reconstructed from the abstract, a review and the notes of a re-implementation by others; no official code was
    found, and the paper's text was not read. Known are the objective (maximise the summed saliency of M tokens whose
    cosine similarities are at most a threshold) and that it is solved greedily. Ours, or the re-implementation's, are:
    saliency is the cosine of token and last text token, the threshold, the layer, and that tokens fill up by saliency
    when no admissible one is left, so that the budget is met. States are compared after the LLM's final norm. Kept
    tokens stay in raster order with their original positions.

    Args:
        layer: decoder layer before which tokens are dropped; 0 is the LLM's input, where input embeddings are compared.
        threshold: largest cosine similarity of two kept tokens; the re-implementation's 0.9.
        query: "last" text token (re-implementation), or the "mean" of all text tokens.
    """

    slug = "greedyprune"
    paper = Paper("GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models", "2506.13166")
    steps = ("by descending text similarity, skipping tokens like a kept one", "none", "drop")
    fidelity = "reconstructed"
    tags = frozenset({"query_aware", "permutation_equivariant"})
    at = "layer"

    layer: Annotated[int, Within("[0, inf)", "a layer, or 0 for the LLM's input,")] = 2
    threshold: float = 0.9
    query: Annotated[str, OneOf("last", "mean")] = "last"

    def stages(self) -> tuple[Stage, ...]:
        site = Site("layer", self.layer) if self.layer else Site("llm_in")
        names = ("normed_states", "text_states") if self.layer else ("text_embeds",)
        return (Stage(site, self.filter, signals=tuple(Signal(name) for name in names), pool="sample"),)

    def picks(self, tokens: Tokens) -> Tensor:
        """The tokens in the order in which they are picked, [B, K]."""
        states = tokens.signal("normed_states") if self.layer else tokens.x
        texts = tokens.signal("text_states" if self.layer else "text_embeds")
        query = self._query(texts.float(), tokens.signal("text_mask"))
        saliency = torch.einsum("bnd,bd->bn", normalize(states.float(), dim=-1), query)
        return unlike_picks(states, saliency, max(tokens.budget), self.threshold, mask=tokens.mask)

    def filter(self, tokens: Tokens) -> Tensor:
        picks = self.picks(tokens)
        return ascending(picks.masked_fill(~valid_prefix(tokens.budget, picks.shape[1], picks.device), -1))

    def _query(self, texts: Tensor, text_mask: Tensor) -> Tensor:
        """What tokens are compared with, of length 1, [B, D]."""
        if self.query == "mean":
            return normalize((texts * text_mask[..., None]).sum(dim=1), dim=-1)
        place = torch.arange(texts.shape[1], device=texts.device)
        last = torch.where(text_mask, place, 0).amax(dim=1, keepdim=True)
        return normalize(take_rows(texts, last)[:, 0], dim=-1)
