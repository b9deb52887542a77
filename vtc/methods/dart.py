"""DART: keep a few pivots and the tokens that are least like them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.catalogue.registry import register
from vtc.options import Variant
from vtc.primitives import take_rows, topk_keep, valid_prefix
from vtc.stages import Links, Method, Paper, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class DART(Method):
    """Duplication-aware reduction before layer K: image and text pivots by key norm, then the least similar tokens.

    "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv 2502.11494).
    Pivots are the tokens with the largest L1 norm of the layer's keys (heads concatenated), in the image and in the
    text behind it. Each pivot in turn picks the tokens with the lowest cosine similarity to it, on hidden states after
    the LLM's final norm, from those that are left. Image pivots and picks stay; positions stay the original ones.

    The published code rounds the budget to pivots + 8 T, and visits the pivots in the iteration order of a Python set
    of their places in the prompt, which changes the result. The default visits image pivots, then text pivots, by
    descending norm, and meets the budget exactly.

    Args:
        layer: K, the first layer that sees fewer tokens.
        pivots: image pivots; text pivots are as many.
        variant: "paper" or "reference" (order and rounding of the published code).
    """

    slug = "dart"
    paper = Paper(
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        "2502.11494",
        "EMNLP 2025",
    )
    steps = ("pivots by key norm, then the tokens least similar to each", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens behind the cut at layer 2 (68 in the published code): 93.7 % of the full "
        "model's average over 10 benchmarks; the paper's table in an annotated copy"
    )
    tags = frozenset({"query_aware"})
    at = "layer"
    defaults = {"llava": 128}  # the published script's max_num_trunction

    layer: int = 2
    pivots: int = 4
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        names = ("keys", "normed_states", "position", "text_keys", "text_states", "text_position", "text_after")
        signals = tuple(Signal(name) for name in names)
        return (Stage(Site("layer", self.layer), self.filter, None, self.compress, signals, pool="sample"),)

    def filter(self, tokens: Tokens) -> Tensor:
        is_text = tokens.signal("text_mask") & tokens.signal("text_after")
        image = self._pivots(tokens.signal("keys"), tokens.mask, tokens.budget)
        text = self._pivots(tokens.signal("text_keys"), is_text, [self.pivots] * len(tokens.budget))
        order = self._visiting_order(tokens, image, text)
        is_pivot = torch.cat([image >= 0, text >= 0], dim=1).gather(1, order)
        states = normalize(tokens.signal("normed_states").float(), dim=-1)
        texts = normalize(tokens.signal("text_states").float(), dim=-1)
        pivots = torch.cat([take_rows(states, image), take_rows(texts, text)], dim=1)
        pivots = take_rows(pivots, order)
        dissimilarity = -torch.einsum("bpd,bnd->bpn", pivots, states)
        quota = self._quota(tokens, is_pivot)
        picked = torch.zeros(tokens.mask.shape[0], tokens.mask.shape[1] + 1, dtype=torch.bool, device=order.device)
        picked = picked.scatter(1, torch.where(image < 0, tokens.mask.shape[1], image), True)[:, :-1]
        for visit in range(is_pivot.shape[1]):
            free = tokens.mask & ~picked
            ranked = dissimilarity[:, visit].masked_fill(~free, -torch.inf).sort(dim=1, descending=True, stable=True)
            rank = ranked.indices.argsort(dim=1)
            picked = picked | (free & (rank < quota[:, visit, None]))
        return topk_keep(picked.float(), self._kept(tokens), mask=tokens.mask)

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        return TokenMap.select(keep, tokens.x.shape[1], self._kept(tokens))

    def _pivots(self, keys: Tensor, mask: Tensor, most: Sequence[int]) -> Tensor:
        """The tokens with the largest L1 norm of their keys, by descending norm; -1 where there are fewer."""
        norm = keys.float().abs().sum(dim=(1, 3)).masked_fill(~mask, -torch.inf)
        best = norm.sort(dim=1, descending=True, stable=True)
        width = min(self.pivots, norm.shape[1])
        missing = torch.isinf(best.values[:, :width]) | ~valid_prefix(most, width, norm.device)
        return best.indices[:, :width].masked_fill(missing, -1)

    def _kept(self, tokens: Tokens) -> list[int]:
        if self.variant == "reference":
            return [self.pivots + 2 * self.pivots * (k // (2 * self.pivots)) for k in tokens.budget]
        return list(tokens.budget)

    def _quota(self, tokens: Tokens, is_pivot: Tensor) -> Tensor:
        """How many tokens each visited pivot picks, [B, P]: even shares, the first pivots take the remainder."""
        if self.variant == "reference":
            share = torch.tensor([k // (2 * self.pivots) for k in tokens.budget], device=is_pivot.device)
            return share[:, None] * is_pivot
        image = [min(self.pivots, k) for k in tokens.budget]
        picks = torch.tensor(tokens.budget, device=is_pivot.device) - torch.tensor(image, device=is_pivot.device)
        count = is_pivot.sum(dim=1)
        rank = is_pivot.long().cumsum(dim=1) - 1
        share = (picks // count)[:, None] + (rank < (picks % count)[:, None])
        return share * is_pivot

    def _visiting_order(self, tokens: Tokens, image: Tensor, text: Tensor) -> Tensor:
        """Places in [image pivots, text pivots] in the order in which they pick, [B, P]."""
        pivots = torch.cat([image, text], dim=1)
        if self.variant == "paper":
            return torch.arange(pivots.shape[1], device=image.device).expand_as(pivots)
        places = torch.cat(
            [
                tokens.signal("position").gather(1, image.clamp(min=0)),
                tokens.signal("text_position").gather(1, text.clamp(min=0)),
            ],
            dim=1,
        )
        # the published code iterates over a Python set of places; only Python itself knows that order
        orders = []
        for row in places.tolist():
            where = {place: index for index, place in enumerate(row)}
            orders.append([where[place] for place in set(row)])
        return torch.tensor(orders, device=image.device)
