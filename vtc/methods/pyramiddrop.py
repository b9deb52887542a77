"""PyramidDrop: at the end of each stage of the LLM, drop the tokens that the prompt's last token ignores."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import BudgetError
from vtc.options import Ascending, OneOf, Within
from vtc.primitives import geometric_pace, topk_keep
from vtc.stages import Method, Paper, Schedule, Signal, Site, Stage
from vtc.tokens import Budget, Tokens

#: after layers 8, 16 and 24 of 32
DEPTHS = (8 / 32, 16 / 32, 24 / 32)


@register
@dataclass(frozen=True)
class PyramidDrop(Method):
    """The LLM is cut into stages, and behind each but the last the same share of the visual tokens stays.

    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (arXiv
    2410.17247). Tokens are ranked by the attention that the last token of the prompt gives them in the next layer: its
    norm, projections and rotation on the states that are about to enter it. After stage s, int(N * ratio^s) of the
    originally N tokens stay. Positions are counted anew after each cut, and go on from there, as in the published code.

    The paper sets the ratio; here it follows from the budget k. "final": k tokens are left in the last stage, so that
    the main setting (ratio 0.5) is a budget of 12.5 %. "average": the paper's cost model, in which the mean over
    stages of equal length is k; the first stage is full, and what is less than its share cannot be met. The layers and
    ratios behind the rows of 192, 128 and 64 tokens are not in the published code. All images of a sample form one pool
    (the published code takes one image).

    Args:
        layers: layers from which on fewer tokens are seen (0-based); (): 8, 16 and 24 of 32, as shares of the depth.
        ratio: share of the tokens that stays at each cut; 0: from the budget. With a ratio, the budget, if there is
            one, is the least that stays.
        convention: what the budget counts, "final" or "average".
    """

    slug = "pyramiddrop"
    paper = Paper(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        "2410.17247",
        "CVPR 2025",
    )
    steps = ("top-k attention of the last query row in the layer behind each stage", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, half of the tokens at each of three cuts, 270 of 576 on average over the layers: average 67.1 "
        "(full 67.5); as copied in notes on table 1 of the paper"
    )
    tags = frozenset({"query_aware", "permutation_equivariant"})
    positions = "renumber"
    at = "layers"
    defaults = {"llava": 0.125}  # paper: four stages, ratio 0.5

    layers: Annotated[tuple[int, ...], Ascending()] = ()
    ratio: Annotated[float, Within("[0, 1)", "a share, or 0 for the budget's,")] = 0.0
    convention: Annotated[str, OneOf("final", "average")] = "final"

    def stages(self) -> tuple[Stage, ...]:
        sites = [Site("layer", layer) for layer in self.layers or DEPTHS]
        budget = Budget(tokens=1) if self.ratio and self.budget is None else None
        return tuple(
            Stage(
                site,
                self.filter,
                signals=(Signal("query_attention", layer=1),),
                pool="sample",
                budget=budget,
                schedule=self._schedule(cut, len(sites)),
            )
            for cut, site in enumerate(sites, start=1)
        )

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(tokens.signal("query_attention"), tokens.budget, mask=tokens.mask)

    def _schedule(self, cut: int, cuts: int) -> Schedule:
        """Tokens that stay after cut number `cut` (from 1)."""
        if self.ratio:
            return lambda n, k: max(k, int(n * self.ratio**cut))
        if self.convention == "final":
            return lambda n, k: geometric_pace(n, k, cut - 1, cuts)
        return lambda n, k: max(1, int(n * self._ratio_of_mean(n, k, cuts + 1) ** cut + 1e-9))

    def _ratio_of_mean(self, total: int, budget: int, stages: int) -> float:
        """r for which the mean of 1, r, r^2 ... over the stages is budget / total.

        Raises:
            BudgetError: the first stage alone is more.
        """
        if budget * stages <= total:
            raise BudgetError(
                f"an average of {budget} of {total} visual tokens over {stages} stages cannot be met by method "
                f"{self.slug!r}, whose first stage is full: more than {total // stages} are needed. Use "
                "convention='final', or a larger budget."
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = sum(middle**s for s in range(stages)) / stages
            low, high = (middle, high) if mean < budget / total else (low, middle)
        return high
