"""STAR: drop before the LLM what other visual tokens ignore, and in a layer what the text does not resemble."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import attention_rows, received_attention
from vtc.options import Depth, OneOf, Within, layer_at
from vtc.primitives import instruction, topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class STAR(Method):
    """Two stages of scaled dot products between plain features, without the model's own projections.

    "STAR: Stage-Wise Attention-Guided Token Reduction for Efficient Large Vision-Language Models Inference" (arXiv
    2505.12359). Reconstructed from a review. Both printed scores take the mean of a softmax over the axis that it
    normalises, which is the same number for every token. Read so that they rank:

    - stage 1, A = softmax(H H^T / sqrt(d)) of the projected visual tokens: the mean of a column, the attention that a
      token receives from the others (the review has the mean of a row);
    - stage 2, at layer K, between visual and text states: the softmax runs over the visual tokens, mean over the text
      ("softmax"), or there is none ("logits").

    States of stage 2 are taken behind the LLM's final norm, the text is that behind the image, and there is no response
    yet when the prompt is prefilled. K, the split between the stages and the norm are ours. The budget is what stays
    behind both.

    Args:
        layer: K, the first layer that sees the tokens of stage 2 alone; below 1 it is a share of the depth.
        share: share of the tokens that have to go which go in stage 1.
        relevance: "softmax" or "logits".
    """

    slug = "star"
    paper = Paper(
        "STAR: Stage-Wise Attention-Guided Token Reduction for Efficient Large Vision-Language Models Inference",
        "2505.12359",
    )
    steps = ("similarity received from visual tokens, then from the text", "none", "drop")
    fidelity = "reconstructed"
    tags = frozenset({"query_aware", "permutation_equivariant"})
    positions = "compact"
    at = "layer"

    layer: Annotated[int | float, Depth()] = 0.5
    share: Annotated[float, Within("(0, 1)", "a share")] = 0.5
    relevance: Annotated[str, OneOf("softmax", "logits")] = "softmax"

    def stages(self) -> tuple[Stage, ...]:
        names = ("normed_states", "text_states", "text_after")
        site = Site("layer", layer_at(self.layer))
        return (
            Stage(Site("llm_in"), self.by_vision, schedule=self.between),
            Stage(site, self.by_text, signals=tuple(Signal(name) for name in names), pool="sample"),
        )

    def between(self, total: int, budget: int) -> int:
        """Tokens that enter the LLM."""
        return total - round((total - budget) * self.share)

    def by_vision(self, tokens: Tokens) -> Tensor:
        """Stage 1, [B, K]."""
        x = tokens.x[:, None]
        score = received_attention(x, x, segments=torch.where(tokens.mask, 0, -1))
        return topk_keep(score, tokens.budget, mask=tokens.mask)

    def by_text(self, tokens: Tokens) -> Tensor:
        """Stage 2, [B, K]."""
        is_text = instruction(tokens)
        text, states = tokens.signal("text_states")[:, None], tokens.signal("normed_states")[:, None]
        given = attention_rows(text, states, mask=tokens.mask, softmax=self.relevance == "softmax")
        score = given.masked_fill(~is_text[..., None], 0).sum(dim=1)
        return topk_keep(score, tokens.budget, mask=tokens.mask)
