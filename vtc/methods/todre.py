"""ToDRE: keep tokens that are unlike each other, and late in the LLM none at all, once the text is done with them."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtc.catalogue.registry import register
from vtc.kernels import farthest_point, max_sum
from vtc.options import Depth, OneOf, layer_at
from vtc.primitives import ascending, instruction, keep_where, settled, valid_prefix
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Budget, Tokens


@register
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy diversity of the LLM's input features, then all visual tokens leave where text ignores them.

    "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757, version 2). No
    official code was found.

    Stage 1, before the LLM: each pick has the smallest summed cosine to those before it, the first one is the token
    that [CLS] attends to most in the tower's last layer. The first version's abstract speaks of greedy k-center, which
    `objective` offers. All crops of an image and all frames of a video form one pool. Output order and positions are
    not stated: tokens stay in raster order with their original positions.

    Stage 2, in the LLM: when text tokens give visual ones less than `tau` of their attention and visual tokens give
    text less than that too (mean over heads and rows, of all visual tokens of a sample), every visual token leaves,
    for the layers from `probe` on and for decoding. Behind an image that stands before the text, visual tokens see
    none of it, and the first share decides. Text is that behind the image; a prompt without any keeps its tokens.

    The budget is what stage 1 leaves; whether stage 2 acts follows from the content.

    Args:
        objective: "max_sum" (algorithm 1 of version 2) or "k_center" (wording of version 1).
        pivot: first pick; "cls", or for towers without [CLS] "random" (the paper's advice, drawn with `seed`), or the
            token "nearest" to or "farthest" from the mean feature (its ablation; by cosine, our choice).
        thumbnail: whether the "cls" pivot comes from the first segment alone, the thumbnail of AnyRes; False looks in
            all of them, as the paper does for videos.
        layer: layer of the [CLS] attention, counted from the feature layer; 1 is the last layer of LLaVA's tower.
        stage: "both", or "1" or "2" alone.
        tau: share of attention under which visual tokens are not needed any more.
        probe: first layer that may do without them; the attention is that of the layer before it. Below 1 it is a share
            of the depth (the paper: 7/8, the 28th of 32 layers is asked).
    """

    slug = "todre"
    paper = Paper("ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", "2505.18757")
    steps = ("max-sum dispersion from the token [CLS] attends to most, then all or nothing", "none", "drop")
    fidelity = "paper"
    headline = (
        "LLaVA-NeXT-7B, 288 of 2880 tokens enter the LLM, and may leave it later: 95.0 % of the full model's average "
        "over 8 benchmarks; version 2 of the paper"
    )
    tags = frozenset({"adaptive", "query_aware", "drops_all"})

    objective: Annotated[str, OneOf("max_sum", "k_center")] = "max_sum"
    pivot: Annotated[str, OneOf("cls", "random", "nearest", "farthest")] = "cls"
    thumbnail: bool = True
    layer: int = 1
    seed: int = 0
    stage: Annotated[str, OneOf("both", "1", "2")] = "both"
    tau: float = 0.1
    probe: Annotated[int | float, Depth()] = 7 / 8

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("cls_attention", layer=self.layer),) if self.pivot == "cls" else ()
        first = Stage(Site("llm_in"), self.filter, signals=signals)
        names = ("text_attention", "attention_to_text", "text_after")
        second = Stage(
            Site("layer", layer_at(self.probe)),
            self.needed,
            None,
            settled(),
            tuple(Signal(name) for name in names),
            pool="sample",
            budget=Budget(ratio=1.0),
        )
        return {"1": (first,), "2": (second,), "both": (first, second)}[self.stage]

    def picks(self, tokens: Tokens) -> Tensor:
        """The tokens in the order in which they are picked, [B, K]."""
        select = max_sum if self.objective == "max_sum" else farthest_point
        return select(tokens.x, max(tokens.budget), mask=tokens.mask, start=self._pivot(tokens))

    def filter(self, tokens: Tokens) -> Tensor:
        picks = self.picks(tokens)
        return ascending(picks.masked_fill(~valid_prefix(tokens.budget, picks.shape[1], picks.device), -1))

    def needed(self, tokens: Tokens) -> Tensor:
        """Stage 2: all visual tokens of a sample, or none, [B, N]."""
        is_text, is_visual = instruction(tokens), tokens.mask
        to_vision, to_text = tokens.signal("text_attention").float(), tokens.signal("attention_to_text").float()
        texts, visuals = is_text.sum(dim=1), is_visual.sum(dim=1)
        from_text = (to_vision * (is_text[..., None] & is_visual[:, None])).sum(dim=(1, 2)) / texts.clamp(min=1)
        from_vision = (to_text * (is_visual[..., None] & is_text[:, None])).sum(dim=(1, 2)) / visuals
        stays = (from_text >= self.tau) | (from_vision >= self.tau) | (texts == 0)
        return keep_where(is_visual & stays[:, None], max(tokens.lengths))

    def _pivot(self, tokens: Tokens) -> Tensor:
        if self.pivot == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.rand((), generator=generator, dtype=torch.float64)  # groups of equal length share their pivot
            return (drawn * torch.tensor(tokens.lengths)).long().to(tokens.x.device)
        candidates = tokens.mask
        if self.pivot == "cls":
            score = tokens.signal("cls_attention").float()
            if self.thumbnail and tokens.layout is not None:
                candidates = candidates & (tokens.layout.segment == 0)
        else:
            x = tokens.x.float() * tokens.mask[..., None]
            score = cosine_similarity(x, x.sum(dim=1, keepdim=True), dim=-1)
            score = score if self.pivot == "nearest" else -score
        return score.masked_fill(~candidates, -torch.inf).argmax(dim=1)
