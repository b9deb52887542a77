"""LVLM_CSP: a few tokens go first, all come back for the layers that look closely, and most leave for good."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.options import OneOf, Within
from vtc.primitives import seeded_uniform, topk_keep
from vtc.stages import Method, Paper, Park, Signal, Site, Stage
from vtc.tokens import Budget, Tokens

#: where the three ranges of layers begin; ours, the paper's are not known
DEPTHS: tuple[int | float, ...] = (0, 0.25, 0.5)


@register
@dataclass(frozen=True)
class LVLMCSP(Method):
    """Clustering, scattering and pruning in three consecutive ranges of decoder layers.

    "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning
    Segmentation" (arXiv 2504.10854). Reconstructed from the abstract and a review that covers the first range:

    - clustering: N_c representative tokens of each image run alone, the others are parked;
    - scattering: all tokens are there again, at their own places. How those that were parked are filled in is not
      known: here they come back as they were, and the representatives as the layers made them;
    - pruning: by the attention of the [SEG] token, which no stock model has; here the last token of the prompt or the
      mean over the text behind the image. The budget is what stays.

    Ranges of layers and N_c are ours. The selector that takes tokens from the masks of a light segmenter is left out:
    it needs that segmenter. Positions stay the original ones, as parked tokens come back to their places.

    Args:
        layers: first layers of clustering, scattering and pruning (0-based, or as shares of the depth); (): 0, one
            quarter and one half.
        clusters: N_c as a share of the tokens of an image.
        selector: "uniform": tokens i * floor(N / N_c); "cls": the attention of [CLS] at the feature layer; "random",
            drawn with `seed`.
        query: "last" or "text".
    """

    slug = "lvlm-csp"
    paper = Paper(
        "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning "
        "Segmentation",
        "2504.10854",
    )
    steps = ("representative tokens first, then all, then top-k attention of the query", "none", "park, then drop")
    fidelity = "reconstructed"
    headline = (
        "a 7B model for reasoning segmentation, 70 % fewer FLOPs of image tokens, average over the layers: 1 % lower; "
        "the abstract"
    )
    tags = frozenset({"query_aware"})
    at = "layers"

    layers: tuple[int | float, ...] = ()
    clusters: Annotated[float, Within("(0, 1]", "a share")] = 0.25
    selector: Annotated[str, OneOf("uniform", "cls", "random")] = "uniform"
    query: Annotated[str, OneOf("last", "text")] = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) not in (0, 3):
            raise SpecError(
                f"layers={self.layers} of method {self.slug!r}: the first layers of clustering, scattering and "
                "pruning, e.g. '0|8|16'."
            )

    def stages(self) -> tuple[Stage, ...]:
        first, second, third = self.layers or DEPTHS
        seen = (Signal("cls_attention"),) if self.selector == "cls" else ()
        share = Budget(ratio=self.clusters)
        attention = Signal("query_attention", rows=self.query)
        return (
            Stage(Site("layer", first), self.cluster, signals=seen, budget=share, leave=Park(until=second)),
            Stage(Site("layer", third), self.prune, signals=(attention,), pool="sample"),
        )

    def cluster(self, tokens: Tokens) -> Tensor:
        """The representatives, [B, N_c]."""
        if self.selector == "uniform":
            step = torch.tensor([n // k for n, k in zip(tokens.lengths, tokens.budget, strict=True)])[:, None]
            place = torch.arange(max(tokens.budget))
            inside = place < torch.tensor(tokens.budget)[:, None]
            return torch.where(inside, place * step, -1).to(tokens.x.device)
        score = tokens.signal("cls_attention") if self.selector == "cls" else seeded_uniform(tokens, self.seed)
        return topk_keep(score, tokens.budget, mask=tokens.mask)

    def prune(self, tokens: Tokens) -> Tensor:
        """What stays for good, [B, K]."""
        return topk_keep(tokens.signal("query_attention"), tokens.budget, mask=tokens.mask)
