"""Control: keep a seeded random subset."""

from dataclasses import dataclass

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.primitives import seeded_uniform, topk_keep
from vtc.stages import Method, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class Random(Method):
    """Random subset of each image, the floor that any method has to beat.

    Every image of the same length loses the same places for the same seed, so that a batch of two equals two batches
    of one. Repeat with several seeds for an average.

    Args:
        seed: seed of the local generator; the global one is not touched.
    """

    slug = "random"
    steps = ("uniform random scores, seeded", "none", "drop")
    fidelity = "control"
    tags = frozenset({"random"})

    seed: int = 0

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("llm_in"), self.filter),)

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(seeded_uniform(tokens, self.seed), tokens.budget, mask=tokens.mask)
