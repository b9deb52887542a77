"""DivPrune: keep the most diverse tokens."""

from dataclasses import dataclass

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import farthest_point
from vtc.primitives import ascending, valid_prefix
from vtc.stages import Method, Paper, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity of the LLM's input features under cosine distance.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175). The first pick is
    the token whose nearest neighbour is farthest; each next one maximises its distance to the picked set. All visual
    tokens of a sample form one pool. A picked token is never picked again: the published code repeats one when
    distinct tokens run out.
    """

    slug = "divprune"
    paper = Paper(
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", "2503.02175", "CVPR 2025"
    )
    steps = ("farthest-point picks under cosine distance", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens enter the LLM: 94.7 % of the full model's average; as copied in CDPruner's "
        "project page"
    )
    tags = frozenset({"permutation_equivariant"})
    positions = "compact"
    defaults = {"llava": 0.098}  # SUBSET_RATIO of the published scripts

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("llm_in"), self.filter, pool="sample"),)

    def picks(self, tokens: Tokens) -> Tensor:
        """The tokens in the order in which they are picked."""
        return farthest_point(tokens.x, max(tokens.budget), mask=tokens.mask)

    def filter(self, tokens: Tokens) -> Tensor:
        picks = self.picks(tokens)
        return ascending(picks.masked_fill(~valid_prefix(tokens.budget, picks.shape[1], picks.device), -1))
