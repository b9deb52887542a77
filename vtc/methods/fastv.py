"""FastV: drop the tokens that the prompt's last token ignores in an early layer."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.options import OneOf
from vtc.primitives import topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class FastV(Method):
    """Top-k of the attention of layer K-1, before layer K (both 0-based indices into the decoder).

    "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764). Positions stay the original ones. The paper ranks
    by the attention from all tokens, the published code by the last query row alone; `query` chooses, and the
    default follows the code, as every published number does. All visual tokens of a sample form one pool.

    Args:
        layer: K, the first layer that sees fewer tokens; the paper's main setting is 2 with half of the tokens kept.
        query: "last" (code) or "mean" (text of the paper).
    """

    slug = "fastv"
    paper = Paper(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        "2403.06764",
        "ECCV 2024",
    )
    steps = ("top-k attention of the last query row at layer K-1", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, half of the tokens behind the cut at layer 2, layers 0 and 1 see all: average of 4 benchmarks "
        "69.7 (full 69.8); table 1 of the paper"
    )
    tags = frozenset({"query_aware", "permutation_equivariant"})
    at = "layer"
    defaults = {"llava": 0.5}  # paper, table 1: K = 2, R = 50 %

    layer: int = 2
    query: Annotated[str, OneOf("last", "mean")] = "last"

    def stages(self) -> tuple[Stage, ...]:
        signal = Signal("query_attention", rows=self.query)
        return (Stage(Site("layer", self.layer), self.filter, signals=(signal,), pool="sample"),)

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(tokens.signal("query_attention"), tokens.budget, mask=tokens.mask)
