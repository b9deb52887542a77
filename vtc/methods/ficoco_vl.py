"""FiCoCo-VL: FiCoCo-V in the vision tower and FiCoCo-L in the language model, one after the other."""

from dataclasses import dataclass, replace
from typing import Annotated

from vtc.catalogue.registry import register
from vtc.methods.ficoco_l import FiCoCoL
from vtc.methods.ficoco_v import PAPER, FiCoCoV
from vtc.options import Within
from vtc.primitives import even_pace
from vtc.stages import Method, Repeat, Stage


@register
@dataclass(frozen=True)
class FiCoCoVL(Method):
    """FiCoCo-V merges part of the tokens in the tower, FiCoCo-L the rest in the decoder.

    In the first version only of "Filter, Correlate, Compress" (arXiv 2411.17686), of which tables and captions were
    read. Reconstructed from those: both halves at once. How the paper shares a budget between them is not known: here
    `share` of what has to go leaves in the tower. All other options have their defaults; see `ficoco-v` and `ficoco-l`.

    Args:
        layer: first decoder layer that sees fewer tokens.
        share: share of the tokens that leave inside the tower.
    """

    slug = "ficoco-vl"
    paper = PAPER
    steps = ("ficoco-v, then ficoco-l", "attention inside the tower, then in the LLM", "mean with weights alpha")
    fidelity = "reconstructed"
    tags = FiCoCoV.tags | FiCoCoL.tags
    positions = "renumber"
    at = "layer"

    layer: int = 6
    share: Annotated[float, Within("(0, 1)", "a share")] = 0.5

    def stages(self) -> tuple[Stage, ...]:
        (tower,) = FiCoCoV(budget=self.budget).stages()
        (llm,) = FiCoCoL(self.layer, budget=self.budget).stages()
        return replace(tower, schedule=Repeat(self.tower_pace)), replace(llm, schedule=Repeat(self.layer_pace))

    def between(self, total: int, budget: int) -> int:
        """Tokens that leave the tower."""
        return total - round((total - budget) * self.share)

    def tower_pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay after block `step` of `steps`."""
        return even_pace(total, self.between(total, budget), step, steps)

    def layer_pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay after the stage before layer `step` of `steps`."""
        return even_pace(self.between(total, budget), budget, step, steps)
