"""Control: keep a seeded random subset."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.primitives import topk_keep
from vtc.registry import register
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
        drawn = {}
        for n in set(tokens.lengths):
            generator = torch.Generator().manual_seed(self.seed)
            drawn[n] = torch.nn.functional.pad(torch.rand(n, generator=generator), (0, tokens.x.shape[1] - n))
        score = torch.stack([drawn[n] for n in tokens.lengths]).to(tokens.x.device)
        return topk_keep(score, tokens.budget, mask=tokens.mask)
