"""FasterVLM: keep the tokens that [CLS] looks at."""

from dataclasses import dataclass

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.options import Score
from vtc.primitives import topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class FasterVLM(Method):
    """Top-k of the [CLS] attention of the feature layer, mean over heads; kept tokens stay in raster order.

    "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (arXiv 2412.01818). The row is the
    softmax over all tokens, [CLS] included, and is not renormalised. Budgets count each image (each crop with AnyRes).
    The published code renumbers positions (`positions="compact"`).

    Args:
        score: "cls", or "received" for towers without [CLS]: the attention that a token receives from all others, the
            authors' advice for such towers.
    """

    slug = "fastervlm"
    paper = Paper(
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        "2412.01818",
    )
    steps = ("top-k [CLS] attention", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 58 of 576 tokens enter the LLM: 94.24 % of the full model's average over 10 benchmarks; the "
        "authors' project page"
    )
    tags = frozenset({"permutation_equivariant"})
    positions = "compact"
    defaults = {"llava": 144}  # 75 % reduction, the project page's first row

    score: Score = "cls"

    @property
    def signal(self) -> str:
        return "cls_attention" if self.score == "cls" else "received_attention"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("tower_out"), self.filter, signals=(Signal(self.signal),)),)

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(tokens.signal(self.signal), tokens.budget, mask=tokens.mask)
