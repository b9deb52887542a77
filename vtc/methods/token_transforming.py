"""Token Transforming, in the spirit of its abstract: fewer tokens as a row-normalised matrix times all tokens."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.kernels import cosine_match
from vtc.options import AtLeastOne, Positive
from vtc.primitives import rest_of, shift, size_weighted_merge, take_rows, topk_keep
from vtc.stages import Drop, Links, Method, Paper, Signal, Site, Stage, Weigh
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class TokenTransforming(Method):
    """Many-to-many merging: each token that goes is shared out over several tokens that stay.

    "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration"
    (arXiv 2506.05709). Its repository holds no code, and this is reconstructed from the abstract, which says: pruning
    and merging are both X' = W X with special W, and a W in which a token may contribute to several others keeps more.
    It does not say how anchors are chosen, how W is computed, or at which blocks. Chosen here, none of it the authors':

    - filter: the tokens that receive the most attention stay;
    - correlate: the `spread` most similar of them by the cosine of keys (mean over heads), weights the softmax of the
      cosine over `temperature`;
    - compress: x_j <- sum_i w_ij s_i x_i / sum_i w_ij s_i with sizes s, so that rows of W sum to 1 and a size is the
      mass of a column; later blocks add log(size) to the attention logits.

    At `blocks`, shares of the tower's depth, an equal part of what has to go leaves.

    Args:
        blocks: where, as shares of the blocks up to the feature layer.
        spread: tokens that one is shared out over; 1 is plain merging.
        temperature: of the softmax over cosines.
        proportional: add log(size) to later attention logits; needs eager or sdpa attention in the tower.
    """

    slug = "token-transforming"
    paper = Paper(
        "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer "
        "Acceleration",
        "2506.05709",
    )
    steps = ("top received attention", "several tokens with similar keys, by softmax", "mean by weight and size")
    fidelity = "reconstructed"
    headline = "DeiT-S, 40 % fewer FLOPs: ImageNet top-1 0.1 % lower; the abstract"
    tags = frozenset({"merges"})

    blocks: tuple[float, ...] = (0.25, 0.5, 0.75)
    spread: AtLeastOne = 4
    temperature: Positive = 0.1
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)):
            raise SpecError(
                f"blocks={self.blocks} of method {self.slug!r}: ascending shares of the depth, e.g. 0.25|0.5."
            )

    def stages(self) -> tuple[Stage, ...]:
        count = len(self.blocks)

        def part(i: int) -> Stage:
            return Stage(
                Site("tower", self.blocks[i]),
                self.filter,
                self.correlate,
                self.compress,
                tuple(Signal(name) for name in ("keys", "received_attention", "sizes")),
                schedule=lambda n, k: n - (n - k) * (i + 1) // count,
                leave=Weigh() if self.proportional else Drop(),
            )

        return tuple(part(i) for i in range(count))

    def filter(self, tokens: Tokens) -> Tensor:
        prefix = tokens.num_prefix
        kept = topk_keep(tokens.signal("received_attention"), tokens.budget, mask=tokens.mask[:, prefix:])
        front = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        return torch.cat([front, shift(kept, prefix)], dim=1)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        metric = tokens.signal("keys").float().mean(dim=1)
        rest = rest_of(keep, tokens.ends, [k + tokens.num_prefix for k in tokens.budget], tokens.x.shape[1])
        value, slot = cosine_match(
            take_rows(metric, rest),
            take_rows(metric, keep),
            source_mask=rest >= 0,
            target_mask=keep >= tokens.num_prefix,
            topk=min(self.spread, max(tokens.budget)),
        )
        weight = (value / self.temperature).masked_fill(slot < 0, -torch.inf)
        weight = weight.softmax(dim=2).masked_fill(slot < 0, 0)  # rows without any target are padding
        source = rest.clamp(min=0)[..., None].expand_as(slot)
        return Links(source.flatten(1), slot.flatten(1), weight.flatten(1))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        assert links is not None
        budget = tuple(k + tokens.num_prefix for k in tokens.budget)
        token_map = size_weighted_merge(replace(tokens, budget=budget), keep, links)
        own = torch.ones_like(keep).masked_fill(keep < 0, 0).float()
        return replace(token_map, mass=torch.cat([own, links.weight], dim=1))
