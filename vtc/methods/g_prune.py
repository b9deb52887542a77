"""G-Prune: keep the tokens that represent many others on a similarity graph."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.kernels import similarity_degree, similarity_propagate
from vtc.options import Count, OneOf, Positive
from vtc.primitives import segment_table, shift, topk_keep
from vtc.stages import Method, Paper, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class GPrune(Method):
    """Norms of the LLM's input features, propagated over the graph of similar tokens and divided by the degree.

    "What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large Language Models
    from the Perspective of Graph" (arXiv 2501.02268). Tokens are neighbours from a cosine similarity on; a row of the
    graph is the softmax of its similarities over a temperature, itself included, and scores flow along rows into
    columns. The thumbnail of AnyRes and its crops together have a graph each, and keep the same share, rounded down, of
    the budget that newline tokens leave; these always stay. Kept tokens stay in raster order; the published code
    renumbers positions (`positions="compact"`).

    A summary of the paper names a similarity of 0.7 and scores normalised inside each connected component; the
    published code ships 0.5 and divides by the degree, and is followed here. It works with AnyRes inputs alone.

    Args:
        similarity: smallest cosine similarity of neighbours.
        temperature: of the softmax over neighbours.
        iterations: steps of propagation.
        graphs: "anyres" (the first segment, and all others together), or "segment" (one each: frames of a video, ours).
    """

    slug = "g-prune"
    paper = Paper(
        "What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large Language "
        "Models from the Perspective of Graph",
        "2501.02268",
        "AAAI 2025",
    )
    steps = ("top score after propagation on the similarity graph", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-NeXT, 63.57 % fewer FLOPs, dropped before the LLM: VQAv2 -0.95 and TextVQA -2.34 points; as copied in "
        "a summary of the paper"
    )
    positions = "compact"

    similarity: float = 0.5
    temperature: Positive = 0.03
    iterations: Count = 5
    graphs: Annotated[str, OneOf("anyres", "segment")] = "anyres"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("llm_in"), self.filter),)

    def graph_scores(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Flat places [G, W] (-1 is padding) of the tokens of each graph, their degrees and their scores."""
        table = segment_table(tokens, join_crops=self.graphs == "anyres")
        group = torch.arange(len(table), device=table.device) // (len(table) // tokens.x.shape[0])
        place = shift(table, group[:, None] * tokens.x.shape[1])
        mask = place >= 0
        x = tokens.x.flatten(0, 1)[place.clamp(min=0)].float()
        degree = similarity_degree(x, mask=mask, reduce="count", threshold=self.similarity)
        spread = similarity_propagate(
            x,
            torch.linalg.vector_norm(x, dim=-1),
            mask=mask,
            threshold=self.similarity,
            temperature=self.temperature,
            steps=self.iterations,
            transpose=True,
        )
        return place, degree, spread / degree.clamp(min=1)

    def filter(self, tokens: Tokens) -> Tensor:
        place, _, score = self.graph_scores(tokens)
        is_token = place >= 0
        order = score.masked_fill(~is_token, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        # rank j of n comes in when the share reaches j / n: in this order each graph holds its share rounded down
        share = (order.argsort(dim=1) + 1) / is_token.sum(dim=1, keepdim=True).clamp(min=1)
        flat = share.new_full((tokens.mask.numel() + 1,), -1.0)  # one place in front takes the padding
        flat = flat.index_put((place + 1,), torch.where(is_token, share, -1.0))
        needed = flat[1:].view_as(tokens.mask)
        return topk_keep(-needed, tokens.budget, mask=tokens.mask, protect=tokens.mask & (needed < 0))
