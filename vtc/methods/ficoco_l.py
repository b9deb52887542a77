"""FiCoCo-L: filter, correlate, compress in the language model."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import attention_rows, received_attention
from vtc.methods.ficoco_v import PAPER, follows_reference
from vtc.options import Count, OneOf, Share, Variant
from vtc.primitives import (
    even_pace,
    instruction,
    rest_of,
    self_preserving_merge,
    sum_merge,
    targets_above,
    top_links,
    topk_keep,
)
from vtc.stages import Links, Method, Repeat, Signal, Site, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

#: what differs between paper and published code: option -> (paper, reference)
DIFFERENCES: dict[str, tuple[str, str]] = {
    "among": ("mean", "sum"),
    "first": ("free", "kept"),
    "by_text": ("mean", "sum"),
    "targets": ("kept", "all"),
    "merge": ("mean", "sum"),
}


@register
@dataclass(frozen=True)
class FiCoCoL(Method):
    """Redundant visual tokens are merged, by attention direct and by way of the text, inside each later decoder layer.

    "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration" (arXiv 2411.17686).

    - filter: redundancy s_i = beta * (attention i receives from visual tokens) - (1 - beta) * (attention the text
      gives i); the largest go.
    - correlate: C_ij = gamma * A_ij + (1 - gamma) * mean over text k of A_ik A_kj; i goes to the tokens that stay for
      which C_ij reaches its `quantile`.
    - compress: x_j <- (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij), alpha = C, made to sum to 1 over j.

    The same number goes between attention and MLP of each layer from `layer` - 1 on, so that each layer from `layer`
    on sees fewer tokens; it follows from the budget, or is `r` (the published code's 14), and the budget is then the
    least that stays. The published code merges once more in the last layer, for the sake of its MLP alone. Text tokens
    are those behind the image (all, where none are).

    The causal mask forbids visual tokens to see later text, and with it Eq. 3 has no text term. "softmax" takes what
    the text gives visual tokens, each side as probabilities among tokens of one kind; "logits" takes means of scaled
    logits without a mask, as the published code; on the embedded model both keep accuracy at 64 of 576 tokens in the
    last layer (0.92 and 0.945, dense 0.945, 200 questions).

    The published code differs from the paper in five more places. Each is an option, "auto" is what `variant` says,
    and `variant="reference"` equals all recorded arrays of that code. It also takes the first 576 tokens of the prompt
    for the image, whatever they are, which is no option here.

    Args:
        layer: first layer that sees fewer tokens; the published code merges inside layer 5 first.
        beta: weight of redundancy against task relevance.
        gamma: weight of direct attention against attention by way of the text.
        quantile: epsilon, from which share of its correlation on a token receives from another.
        r: tokens merged per layer; 0: from the budget.
        attention: "softmax" or "logits".
        variant: "paper" or "reference", what "auto" means.
        among: the "mean" of the attention over visual tokens (Eq. 3) or its "sum" (reference).
        first: the first visual token may go ("free", paper) or always stays ("kept", reference).
        by_text: the "mean" over text tokens (Eq. 4) or their "sum" (Algorithm 2, and reference).
        targets: tokens that compete for merged ones, and of which the quantile is taken: those that stay ("kept",
            paper) or all ("all", reference; a share that falls on one that goes is lost).
        merge: the weighted "mean" (paper), or the "sum" x_j + sum_i alpha_ij x_i (reference).
        half: where merges happen: between attention and MLP of a layer ("attention", both), or behind its MLP ("mlp",
            0.945 as well).
    """

    slug = "ficoco-l"
    paper = PAPER
    steps = (
        "received attention against attention from the text",
        "top attention, direct and by way of the text",
        "mean with weights alpha, own weight 1",
    )
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 1.5 of 8.5 TFLOPs (no token count was read): 92.8 % of the full model's average over 6 "
        "benchmarks; table 1 of version 4 of the paper"
    )
    tags = frozenset({"merges", "query_aware"})
    positions = "renumber"
    at = "layer"

    layer: int = 6
    beta: Share = 0.6
    gamma: Share = 0.6
    quantile: Share = 0.998
    r: Count = 0
    attention: Annotated[str, OneOf("softmax", "logits")] = "logits"
    variant: Variant = "paper"
    among: Annotated[str, OneOf("auto", *DIFFERENCES["among"])] = "auto"
    first: Annotated[str, OneOf("auto", *DIFFERENCES["first"])] = "auto"
    by_text: Annotated[str, OneOf("auto", *DIFFERENCES["by_text"])] = "auto"
    targets: Annotated[str, OneOf("auto", *DIFFERENCES["targets"])] = "auto"
    merge: Annotated[str, OneOf("auto", *DIFFERENCES["merge"])] = "auto"
    half: Annotated[str, OneOf("attention", "mlp")] = "attention"

    def stages(self) -> tuple[Stage, ...]:
        budget = Budget(tokens=1) if self.r and self.budget is None else None
        names = ("keys", "queries", "text_keys", "text_queries", "text_after")
        return (
            Stage(
                Site("layer", self.layer, before_mlp=self.half == "attention"),
                self.filter,
                self.correlate,
                self.compress,
                tuple(Signal(name) for name in names),
                pool="sample",
                budget=budget,
                schedule=Repeat(self.pace),
            ),
        )

    def is_reference(self, name: str) -> bool:
        """Whether option `name` is what the published code does."""
        return follows_reference(self, name, DIFFERENCES)

    def pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that enter layer `step` of the `steps` last ones."""
        if self.r:
            return max(budget, total - self.r * (step + 1))
        return even_pace(total, budget, step, steps)

    def filter(self, tokens: Tokens) -> Tensor:
        redundancy = self.redundancy(tokens)
        if self.is_reference("first"):
            redundancy = redundancy.clone()
            redundancy[:, 0] = -torch.inf
        return topk_keep(-redundancy, tokens.budget, mask=tokens.mask)

    def correlate(self, tokens: Tokens, keep: Tensor) -> Links:
        rest = rest_of(keep, tokens.lengths, tokens.budget, tokens.x.shape[1])
        keys, is_text, queries = tokens.signal("keys"), instruction(tokens), tokens.signal("queries")
        index = rest.clamp(min=0)[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        rows = queries.gather(2, index)
        is_softmax = self.attention == "softmax"
        direct = attention_rows(rows, keys, mask=tokens.mask, softmax=is_softmax)
        to_text = attention_rows(rows, tokens.signal("text_keys"), mask=is_text, softmax=is_softmax)
        to_text = to_text.masked_fill(~is_text[:, None], 0)
        from_text = self._from_text(tokens).masked_fill(~is_text[..., None], 0)
        by_text = to_text @ from_text.masked_fill(~tokens.mask[:, None], 0)
        if not self.is_reference("by_text"):
            by_text = by_text / is_text.sum(dim=1).clamp(min=1)[:, None, None]
        weight = self.gamma * direct + (1.0 - self.gamma) * by_text
        if not is_softmax:
            itself = rest[..., None] == torch.arange(keys.shape[2], device=rest.device)
            weight = weight.masked_fill(itself | ~tokens.mask[:, None], -torch.inf).softmax(dim=2)
        if self.is_reference("targets"):
            counts = targets_above(self.quantile, tokens.lengths, strict=True)
            return top_links(weight, rest, keep, counts, only_kept=False)
        return top_links(weight, rest, keep, targets_above(self.quantile, tokens.budget))

    def compress(self, tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
        return (sum_merge if self.is_reference("merge") else self_preserving_merge)(tokens, keep, links)

    def redundancy(self, tokens: Tokens) -> Tensor:
        """s of each visual token, [B, N]."""
        keys, queries, is_text = tokens.signal("keys"), tokens.signal("queries"), instruction(tokens)
        number = is_text.sum(dim=1, keepdim=True).clamp(min=1)
        if self.attention == "softmax":
            among = received_attention(queries, keys, segments=torch.where(tokens.mask, 0, -1))
            if self.is_reference("among"):
                among = among * tokens.mask.sum(dim=1, keepdim=True)
            from_text = self._from_text(tokens).masked_fill(~is_text[..., None], 0).sum(dim=1) / number
        else:
            # sums of logits over a row are logits for the sum of the keys
            among = _row_sums(queries, keys, tokens.mask)
            if not self.is_reference("among"):
                among = among / tokens.mask.sum(dim=1, keepdim=True)
            from_text = _row_sums(queries, tokens.signal("text_keys"), is_text) / number
        return (self.beta * among - (1.0 - self.beta) * from_text).masked_fill(~tokens.mask, 0)

    def _from_text(self, tokens: Tokens) -> Tensor:
        """What each text token gives each visual token, [B, T, N]."""
        queries, keys = tokens.signal("text_queries"), tokens.signal("keys")
        return attention_rows(queries, keys, mask=tokens.mask, softmax=self.attention == "softmax")


def _row_sums(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Sum over the keys in `mask` of each query's logits, mean over heads, [B, N]."""
    total = (keys.float() * mask[:, None, :, None]).sum(dim=2, keepdim=True)
    groups = queries.shape[1] // keys.shape[1]
    total = total.repeat_interleave(groups, dim=1)
    return torch.einsum("bhnd,bhkd->bhn", queries.float(), total).mean(dim=1) * queries.shape[-1] ** -0.5
