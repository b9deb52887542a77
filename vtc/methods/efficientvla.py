"""EfficientVLA's token selection: a few key tokens, more by relevance, the rest by difference from the key ones."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import cosine_match
from vtc.options import AtLeastOne, OneOf, Share
from vtc.primitives import keep_where, ranks, take_rows, topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class EfficientVLA(Method):
    """Top tokens by attention with the instruction, then a share alpha by relevance and the rest by diversity.

    "EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models" (arXiv 2506.10100),
    equations 2 to 5, checked against the text; no code is public. Relevance is the attention shared with the text,
    mean over heads, summed over text tokens. Diversity is 1 - the largest cosine similarity to a key token, ranked
    once: the equation compares with the key tokens alone, the sentence after it with all that was selected. Layer
    removal and the caching of the action head are not part of this toolkit. Spatial order and original positions are
    assumptions; the text names neither.

    As printed, attention goes from visual tokens to the text, which a causal LLM masks where the image comes first.
    The default reads it from the text to the visual tokens.

    Args:
        layer: the first layer that sees fewer tokens ("from the 2nd layer").
        key: tokens that are selected first (K_key; 4 in the experiments, 4 to 8 advised).
        alpha: share of the others that is selected by relevance.
        direction: "to_vision" (text rows) or "to_text" (as printed).
    """

    slug = "efficientvla"
    paper = Paper(
        "EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models",
        "2506.10100",
        "NeurIPS 2025",
    )
    steps = ("top attention with the text, then the tokens least similar to the first of them", "none", "drop")
    fidelity = "paper"
    headline = (
        "CogACT, SIMPLER 'pick coke can', token selection alone, 112 of 256 tokens behind the cut: 96.0 % success "
        "(full 91.3 %); table 4 of the paper"
    )
    tags = frozenset({"query_aware", "permutation_equivariant"})
    at = "layer"

    layer: int = 2
    key: AtLeastOne = 4
    alpha: Share = 0.5
    direction: Annotated[str, OneOf("to_vision", "to_text")] = "to_vision"

    def stages(self) -> tuple[Stage, ...]:
        names = ("text_attention" if self.direction == "to_vision" else "attention_to_text",)
        signals = tuple(Signal(name) for name in names)
        return (Stage(Site("layer", self.layer), self.filter, signals=signals, pool="sample"),)

    def relevance(self, tokens: Tokens) -> Tensor:
        """Attention with all text tokens, [B, N]."""
        if self.direction == "to_vision":
            return (tokens.signal("text_attention").float() * tokens.signal("text_mask")[..., None]).sum(dim=1)
        return (tokens.signal("attention_to_text").float() * tokens.signal("text_mask")[:, None]).sum(dim=2)

    def filter(self, tokens: Tokens) -> Tensor:
        key = [min(self.key, k) for k in tokens.budget]
        relevant = [n + int(self.alpha * (k - n)) for n, k in zip(key, tokens.budget, strict=True)]
        place = ranks(self.relevance(tokens), tokens.mask)
        diversity = self.diversity(tokens, place < torch.tensor(key, device=place.device)[:, None])
        is_relevant = place < torch.tensor(relevant, device=place.device)[:, None]
        return topk_keep(diversity, tokens.budget, mask=tokens.mask, protect=is_relevant & tokens.mask)

    def diversity(self, tokens: Tokens, is_key: Tensor) -> Tensor:
        """1 - the largest cosine similarity to a key token, [B, N]."""
        keys = keep_where(is_key & tokens.mask, min(self.key, is_key.shape[1]))
        nearest, _ = cosine_match(tokens.x, take_rows(tokens.x, keys), target_mask=keys >= 0)
        return 1 - nearest[..., 0]
