"""PACT: prune unimportant tokens, cluster the others by density within a distance bound, take back what fits."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import cosine_match
from vtc.options import Within
from vtc.primitives import density_centers, keep_where, mean_merge, settled, slot_of, take_rows, topk_keep
from vtc.stages import Links, Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class PACT(Method):
    """Importance pruning (EUTI), distance-bounded density-peak clustering (DBDPC) and retrieval before one layer.

    "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models" (arXiv 2504.08966).
    Importance is the attention of the mean query to the token, before RoPE, times the norm of its hidden state; the
    int(keep N) most important tokens are clustered. Scanned by falling density, a token opens a cluster when no
    centre lies within `cutoff` in cosine distance of rotated keys: the published code reaches the same centres in
    rounds. Every other token, pruned ones included, joins the nearest centre within `retrieve` times the cutoff, and
    is dropped where there is none. A cluster becomes the plain mean of its members at its centre's place; order and
    positions stay. log(size) goes to the attention logits of merged tokens in this and all later layers (`size_bias`,
    which `patch` may turn off); the published code rounds it through float16, to about 5e-4.

    The number of tokens follows from the content. The budget is a ceiling: centres beyond it, in the order of the
    scan, are not opened and are treated as pruned tokens. The published code has no ceiling.

    Args:
        layer: the layer whose input is reduced, 0-based.
        keep: share of tokens that importance pruning leaves.
        cutoff: cosine distance within which one cluster is made; 0.21 for LLaVA-OneVision-7B, 0.1 for Qwen2-VL-7B.
        retrieve: multiple of the cutoff within which a pruned token is taken back (coef_pruned).
        spread: d_c of the density sum_j exp(-(d_ij / d_c)^2).
    """

    slug = "pact"
    paper = Paper(
        "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models",
        "2504.08966",
        "CVPR 2025",
    )
    steps = (
        "importance pruning, then density peaks further apart than a bound",
        "the nearest centre within a bound",
        "mean of the cluster",
    )
    fidelity = "golden"
    headline = (
        "LLaVA-OneVision-7B, 71.3 % fewer visual tokens (how they are counted was not read): metrics 1.4 % lower; as "
        "copied in a digest of the paper"
    )
    tags = frozenset({"adaptive", "merges"})
    size_bias = True
    at = "layer"

    layer: int = 4
    keep: Annotated[float, Within("(0, 1]", "a share of the tokens")] = 0.55
    cutoff: float = 0.21
    retrieve: float = 1.5
    spread: float = 2.0

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("global_attention"), Signal("layer_keys"))
        site = Site("layer", self.layer)
        return (Stage(site, self.filter, self.correlate, settled(mean_merge), signals, pool="sample"),)

    def importance(self, tokens: Tokens) -> Tensor:
        """Attention of the mean query times the norm of the hidden state, [B, N]."""
        norm: Tensor = torch.linalg.vector_norm(tokens.x.float(), dim=-1)
        return tokens.signal("global_attention").float() * norm

    def important(self, tokens: Tokens) -> Tensor:
        """The tokens that pruning leaves, as an index set."""
        number = [max(1, int(n * self.keep)) for n in tokens.lengths]
        return topk_keep(self.importance(tokens), number, mask=tokens.mask)

    def filter(self, tokens: Tokens) -> Tensor:
        return self.centers(tokens, self.important(tokens))

    def centers(self, tokens: Tokens, candidates: Tensor) -> Tensor:
        """The cluster centres among the index set `candidates`."""
        metric = take_rows(self._metric(tokens), candidates)
        is_center = density_centers(
            metric, candidates >= 0, cutoff=self.cutoff, budget=tokens.budget, spread=self.spread
        )
        chosen = keep_where(is_center, max(tokens.budget))
        return candidates.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, -1)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        metric = self._metric(tokens)
        is_source = tokens.mask & (slot_of(keep, metric.shape[1]) < 0)
        similarity, slot = cosine_match(metric, take_rows(metric, keep), source_mask=is_source, target_mask=keep >= 0)
        fits = is_source & (1 - similarity[..., 0] <= self.retrieve * self.cutoff)
        slot = slot[..., 0].masked_fill(~fits, -1)
        return Links(torch.arange(metric.shape[1], device=slot.device).expand_as(slot), slot, fits.float())

    def _metric(self, tokens: Tokens) -> Tensor:
        """Rotated keys with the heads side by side."""
        return tokens.signal("layer_keys").float().transpose(1, 2).flatten(2)
