"""MustDrop, the parts in the LLM: filter by two thresholds between layers, and cut early caches after the prefill."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.methods.mustdrop import MustDrop, dual_attention
from vtc.options import Ascending, Depth, OneOf, Share, layer_at
from vtc.primitives import at_most, geometric_pace, instruction, keep_where, ranks, settled
from vtc.stages import Drop, Method, Schedule, Signal, Site, Stage
from vtc.tokens import Budget, Tokens

#: behind layers 2, 6, 10 and 14 of 32
DEPTHS = (3 / 32, 7 / 32, 11 / 32, 15 / 32)

KEYS = {"cls": "cls_attention", "received": "received_attention"}


@register
@dataclass(frozen=True)
class MustDropLLM(Method):
    """Tokens that the text as a whole and each text token ignores go; a key set of [CLS] attention never does.

    "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model" (arXiv 2411.10803), its
    prefill and decode parts; the encoder part is `mustdrop`, and 'mustdrop + mustdrop-llm' is the whole. Attention is
    that of the text behind the image, mean over heads, in the layer before each cut. A token goes when its share of all
    that visual tokens get is below `global_threshold` and no text token gives it `individual_threshold`. When the
    prompt is prefilled, the caches from layer `evict` to the last cut keep what is left then, so later tokens see no
    more than that. Positions are counted anew after each cut, as in the published code.

    The thresholds decide how many tokens stay, and the README tunes them per budget: 0.001 and 0.001 for a layer
    average of 192 of 576 tokens, 0.0012 and 0.001 for 128, 0.011 and 0.01 for 64. The code has no budget: here it is a
    ceiling, to which the same share goes at each cut, key tokens last.

    Args:
        layers: layers from which on fewer tokens are seen (0-based, or as shares of the depth); (): behind layers 2, 6,
            10 and 14 of 32.
        evict: the first layer whose cache is cut after the prefill; below 1 it is a share of the depth, 0: none is cut.
        global_threshold: share of the text's attention to visual tokens.
        individual_threshold: attention of one text token.
        key_share: share of the tokens that enter the LLM that never goes.
        key: "cls", "received" (towers without [CLS]: the attention that a token receives from the others) or "none".
        key_layer: layer of the key set's attention, counted from the feature layer; 1 is the last layer of LLaVA's
            tower.
    """

    slug = "mustdrop-llm"
    paper = MustDrop.paper
    steps = ("attention of the text above one of two thresholds, or in the key set", "none", "drop, evict")
    fidelity = "golden"
    headline = (
        "all three parts, LLaVA-1.5-7B, 192 of 576 tokens on average over the layers: 97.2 % of the full model's "
        "average; as copied in a table of HoloV"
    )
    tags = frozenset({"adaptive", "query_aware"})
    positions = "renumber"
    at = "layers"

    layers: Annotated[tuple[int | float, ...], Ascending()] = ()
    evict: Annotated[int | float, Depth(or_zero=True)] = 2 / 32
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    key_share: Share = 0.08
    key: Annotated[str, OneOf(*KEYS, "none")] = "cls"
    key_layer: int = 1

    def stages(self) -> tuple[Stage, ...]:
        sites = self.layers or DEPTHS
        names = ["text_attention", "text_after"]
        signals = [Signal(name) for name in names]
        if self.key != "none":
            signals += [Signal("visual_embeds"), Signal(KEYS[self.key], layer=self.key_layer)]
        evicts = Drop(layer_at(self.evict)) if self.evict else Drop()
        last = len(sites) - 1
        return tuple(
            Stage(
                Site("layer", site),
                self.filter,
                None,
                settled(),
                tuple(signals),
                pool="sample",
                budget=Budget(ratio=1.0) if self.budget is None else None,
                schedule=_ceiling(cut, len(sites)),
                leave=evicts if cut == last else Drop(),
            )
            for cut, site in enumerate(sites)
        )

    def filter(self, tokens: Tokens) -> Tensor:
        attention, is_text = tokens.signal("text_attention").float() * tokens.mask[:, None], instruction(tokens)
        key = self.key_tokens(tokens)
        kept = tokens.mask & dual_attention(
            attention,
            is_text,
            key,
            global_threshold=self.global_threshold,
            individual_threshold=self.individual_threshold,
        )
        total = (attention * is_text[..., None]).sum(dim=1)
        best = tokens.mask & (ranks(total, tokens.mask) == 0)
        kept = kept | (best & ~kept.any(dim=1, keepdim=True))
        return keep_where(at_most(total.masked_fill(key, torch.inf), kept, tokens.budget), max(tokens.budget))

    def key_tokens(self, tokens: Tokens) -> Tensor:
        """Which tokens are among the `key_share` of those that entered the LLM with the largest attention, [B, N]."""
        if self.key == "none":
            return torch.zeros_like(tokens.mask)
        # none of them ever left, so that they are the best of what is there
        entered = tokens.signal("visual_mask").sum(dim=1, keepdim=True)
        count = (entered.double() * self.key_share).ceil()
        return tokens.mask & (ranks(tokens.signal(KEYS[self.key]).float(), tokens.mask) < count)


def _ceiling(cut: int, cuts: int) -> Schedule:
    """Most tokens behind cut number `cut` (from 0)."""
    return lambda n, k: geometric_pace(n, k, cut, cuts)
