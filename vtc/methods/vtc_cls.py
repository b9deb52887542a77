"""VTC-CLS: keep the tokens that [CLS] looks at in several layers of the tower."""

from dataclasses import dataclass

from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.primitives import topk_keep
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class VTCCLS(Method):
    """Top-k of the [CLS] attention (mean over heads), summed over a range of layers that ends at the feature layer.

    "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (arXiv 2412.05819). The published code sums
    the layers `[start_layer:-1]` of the tower, so that the last one, which is behind the features of LLaVA, is left
    out; here the range ends at the feature layer, which is the same for LLaVA. Layers are not normalised against each
    other, and a row is the softmax over all tokens, [CLS] included. Kept tokens stay in raster order and are
    projected alone; the published code renumbers positions (`positions="compact"`) and handles one crop only.

    Nothing is published for towers without [CLS].

    Args:
        start_layer: first layer of the sum, as a Python index into all layers of a tower whose feature layer is its
            last but one (-3: that layer and the one before it). The published scripts take it from the command line
            and name no value; the default, the last quarter of CLIP-L's 24 layers, is ours.
    """

    slug = "vtc-cls"
    paper = Paper("[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", "2412.05819")
    steps = ("top-k [CLS] attention, summed over layers", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, 64 of 576 tokens enter the LLM: average of 8 benchmarks 58.4 (full 62.1); the authors' README"
    )
    tags = frozenset({"permutation_equivariant"})
    positions = "compact"
    defaults = {"llava": 128}  # README: 256, 128, 64

    start_layer: int = -7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_layer == -1:
            raise SpecError("start_layer=-1 of method 'vtc-cls' leaves no layer: use -2 for the feature layer alone.")

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(Site("tower_out"), self.filter, signals=(Signal("cls_attention_layers"),)),)

    def score(self, tokens: Tokens) -> Tensor:
        """The summed attention of each token, [B, N]."""
        layers = tokens.signal("cls_attention_layers").float()
        # the signal ends at the feature layer, a negative index counts from the layer behind it
        start = self.start_layer + 1 if self.start_layer < 0 else self.start_layer
        if start >= layers.shape[1]:
            raise SpecError(
                f"start_layer={start} of method 'vtc-cls': the tower has {layers.shape[1]} layers up to its features."
            )
        return layers[:, start:].sum(dim=1)

    def filter(self, tokens: Tokens) -> Tensor:
        return topk_keep(self.score(tokens), tokens.budget, mask=tokens.mask)
