"""ToMe: merge the most similar tokens of every block of the vision tower."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import bipartite_match
from vtc.options import Count, Within
from vtc.primitives import bipartite_keep, bipartite_links, linear_counts, linear_pace, size_weighted_merge
from vtc.stages import Drop, Links, Method, Paper, Repeat, Signal, Site, Stage, Weigh
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens


@register
@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching between attention and MLP of every block up to the feature layer.

    "Token Merging: Your ViT But Faster" (arXiv 2210.09461). Tokens are split by turns into two sets; each of the first
    finds the most similar of the second by the cosine of its keys (mean over heads), and the r best pairs become means
    weighted by size. Later blocks add log(size) to the attention logits (proportional attention). [CLS] stays. The
    order is the published one, unmerged tokens of the first set and then the second set, so that each block compares
    new pairs; it is raster order again behind the tower.

    r follows from the budget: what has to go is spread over the blocks, evenly or by `inflection`, and the last block
    ends at the budget. With `r` it is the paper's constant number per block, and the budget, if there is one, the least
    that stays. One matching merges half of the tokens at most (the published code stops there without a word); a block
    that must merge more matches what is left again, which is not in the paper.

    Args:
        first: the first block that merges (0-based).
        r: tokens merged per block; 0: from the budget.
        inflection: 0: the same number in each block; -1: falling to 0 (the paper's "decreasing" schedule).
        proportional: add log(size) to later attention logits; needs eager or sdpa attention in the tower.
    """

    slug = "tome"
    paper = Paper("Token Merging: Your ViT But Faster", "2210.09461", "ICLR 2023")
    steps = ("every second token, and those of the rest without a close match", "the most similar key", "mean by size")
    fidelity = "golden"
    headline = "ViT-B/16, 13 tokens merged in each block: ImageNet top-1 82.60 (full 84.57); the authors' README"
    tags = frozenset({"merges"})
    at = "first"

    first: Count = 0
    r: Count = 0
    inflection: Annotated[float, Within("[-1, 1]")] = 0.0
    proportional: bool = True

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("keys"), Signal("sizes"))
        budget = Budget(tokens=1) if self.r and self.budget is None else None
        return (
            Stage(
                Site("tower", self.first),
                self.filter,
                self.correlate,
                self.compress,
                signals,
                budget=budget,
                schedule=Repeat(self.pace),
                leave=Weigh() if self.proportional else Drop(),
            ),
        )

    def pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay after block `step` of `steps`."""
        if not self.r:
            return linear_pace(total, budget, step, steps, inflection=self.inflection)
        return max(budget, total - sum(linear_counts(self.r, self.inflection, steps)[: step + 1]))

    def filter(self, tokens: Tokens) -> Tensor:
        """Prefix, unmerged tokens of the first set, then the second set."""
        metric = tokens.signal("keys").float().mean(dim=1)
        value, _ = bipartite_match(metric, num_protected=tokens.num_prefix, mask=tokens.mask)
        return bipartite_keep(tokens, value, self._merged(tokens))

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        return bipartite_links(tokens, tokens.signal("keys").float().mean(dim=1), keep, self._kept(tokens))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        kept = self._kept(tokens)
        token_map = size_weighted_merge(replace(tokens, budget=tuple(kept)), keep, links)
        if all(k - tokens.num_prefix <= want for k, want in zip(kept, tokens.budget, strict=True)):
            return token_map
        return token_map.then(self.stages()[0].decide(self._half(tokens, token_map)))

    def _merged(self, tokens: Tokens) -> list[int]:
        """Tokens that go in this matching: half of them at most."""
        return [min(max(0, n - k), n // 2) for n, k in zip(tokens.lengths, tokens.budget, strict=True)]

    def _kept(self, tokens: Tokens) -> list[int]:
        return [end - m for end, m in zip(tokens.ends, self._merged(tokens), strict=True)]

    def _half(self, tokens: Tokens, token_map: TokenMap) -> Tokens:
        """What one matching left, as the tokens of the next one."""
        keys = tokens.signal("keys")
        flat = token_map.apply(keys.transpose(1, 2).flatten(2))
        sizes = tokens.signal("sizes")
        share = replace(token_map, weight=None if token_map.slot is None else torch.ones_like(token_map.slot).float())
        signals = {
            "keys": flat.unflatten(2, (keys.shape[1], -1)).transpose(1, 2),
            "sizes": share.apply(sizes.float()[..., None])[..., 0],
        }
        lengths = tuple(n - tokens.num_prefix for n in token_map.lengths)
        return Tokens(token_map.apply(tokens.x), lengths, None, signals, tokens.num_prefix, tokens.budget)
