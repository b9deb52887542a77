"""FlashVLA's token selection: keep the tokens that carry most of the spectrum of the attention output."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.options import OneOf
from vtc.primitives import topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class FlashVLA(Method):
    """Information contribution sum over i <= r of |u_xi s_i| from the singular vectors of the visual tokens.

    "Think Twice, Act Once: Token-Aware Compression and Action Reuse for Efficient Inference in VLA Models" (arXiv
    2505.21200). Reconstructed from public notes on the paper; it has no code. The definition of the effective rank r
    was not seen: the default is the exponential of the entropy of the normalised singular values, rounded. Without
    truncation the score is the one in the code of TokenCarve, which reads the whole layer's output instead of the
    attention's (`source="hidden"`). The reuse of actions is robotics and not part of this toolkit. Spatial order and
    original positions are assumptions.

    The singular vectors come from the eigenvectors of a Gram matrix in float64, min(N, D) wide; the solver waits for
    the device.

    Args:
        layer: the first layer that sees fewer tokens (L_p = 2: after the first two).
        rank: "entropy" or "full".
        source: "attention": the output of the attention of the layer before; "hidden": the output of that layer.
    """

    slug = "flashvla"
    paper = Paper(
        "Think Twice, Act Once: Token-Aware Compression and Action Reuse for Efficient Inference in VLA Models",
        "2505.21200",
    )
    steps = ("top-k share in the leading singular directions of the attention output", "none", "drop")
    fidelity = "reconstructed"
    headline = (
        "OpenVLA, LIBERO, 62.5 % of the visual tokens behind the second layer: 73.7 % success (full 74.4 %); the "
        "abstract and notes on the paper"
    )
    tags = frozenset({"permutation_equivariant"})
    at = "layer"

    layer: int = 2
    rank: Annotated[str, OneOf("entropy", "full")] = "entropy"
    source: Annotated[str, OneOf("attention", "hidden")] = "attention"

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("attention_output"),) if self.source == "attention" else ()
        return (Stage(Site("layer", self.layer), self.filter, signals=signals, pool="sample"),)

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(self.contribution(tokens), tokens.budget, mask=tokens.mask)

    def contribution(self, tokens: Tokens) -> Tensor:
        """The information score of each token, [B, N]."""
        x = tokens.x if self.source == "hidden" else tokens.signal("attention_output")
        x = x.double() * tokens.mask[..., None]  # padding adds nothing to the Gram matrix
        is_wide = x.shape[1] <= x.shape[2]
        gram = x @ x.transpose(1, 2) if is_wide else x.transpose(1, 2) @ x
        squares, vectors = torch.linalg.eigh(gram)
        singular = squares.clamp(min=0).sqrt()  # [B, R], ascending
        if self.rank == "entropy":
            share = singular / singular.sum(dim=1, keepdim=True).clamp(min=1e-30)
            entropy = torch.special.entr(share).sum(dim=1, keepdim=True)
            place = torch.arange(singular.shape[1], device=x.device).flip(0)
            is_used = place < entropy.exp().round()
        else:
            is_used = torch.ones_like(singular, dtype=torch.bool)
        parts = vectors * singular[:, None] if is_wide else x @ vectors  # U S, from either side
        score: Tensor = (parts.abs() * is_used[:, None]).sum(dim=2).float()
        return score
