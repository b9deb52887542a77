"""ShortV: visual tokens are not updated in the layers that contribute least."""

from dataclasses import dataclass

from vtc.calibration import stored_options
from vtc.catalogue.registry import register
from vtc.errors import BudgetError, SpecError
from vtc.stages import Freeze, Method, Paper, Site, Stage, nothing
from vtc.tokens import Budget

#: depth of the LLM, and its layers by ascending contribution, as the README of the published code lists them
PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {
    "llava-1.5-7b": (32, (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)),
    "llava-1.5-13b": (
        40,
        (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
    "llava-next-7b": (32, (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2)),
    "llava-next-13b": (
        40,
        (39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}


@register
@dataclass(frozen=True)
class ShortV(Method):
    """In the layers with the lowest Layer Contribution (LC), visual tokens neither query nor pass the FFN.

    "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers" (arXiv
    2504.00502). No token leaves: frozen tokens still give keys and values of each layer, made of the states that they
    had, so the KV cache is full and decoding costs what it did. LC of a layer is the KL divergence of the next-token
    distributions with and without its update of the visual tokens; `vtc calibrate shortv` measures it for a model.

    The budget is the share of layers in which visual tokens are updated: as many layers as it asks for are frozen, from
    the front of the list. None: all of a published list or of `layers` (published: about 60 % of the layers). A
    calibration ranks every layer and needs a budget.

    Args:
        layers: layers to freeze (0-based), those of the lowest contribution first; (): those of `calibration`.
        calibration: a published list (llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b), a model card that
            has a calibration (scenes-llava, the embedded model), or the path of a file that `vtc calibrate shortv`
            wrote. Not read where `layers` are given.
    """

    slug = "shortv"
    paper = Paper(
        "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers",
        "2504.00502",
        "ICCV 2025",
    )
    steps = ("no visual token, in the layers of lowest contribution", "none", "freeze")
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, all tokens stay, 19 of 32 layers frozen (55 % of the FLOPs): GQA 60.9 (full 61.9), MMB 64.8 "
        "(64.1); as copied in notes on the paper"
    )
    requires = "a ranking of the checkpoint's layers (published: LLaVA-1.5 and LLaVA-NeXT, 7B and 13B)"
    tags = frozenset({"permutation_equivariant"})
    at = "layers"
    defaults = {"llava": 13 / 32}  # the published list: 19 of 32 layers frozen

    layers: tuple[int, ...] = ()
    calibration: str = "llava-1.5-7b"

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = [layer for layer in self.layers if type(layer) is int and layer >= 0]
        if len(set(numbers)) < len(self.layers):
            raise SpecError(f"layers={self.layers} of method 'shortv': different decoder layers from 0 on, e.g. '3|1'.")
        self.ranking()

    def ranking(self) -> tuple[int | None, tuple[int, ...]]:
        """Depth of the LLM that was calibrated (None: unknown), and its layers by ascending contribution.

        Raises:
            SpecError: there is no such calibration, or its file is none.
        """
        if self.layers:
            return None, self.layers
        if self.calibration in PUBLISHED:
            return PUBLISHED[self.calibration]
        order = tuple(stored_options(self.slug, self.calibration, PUBLISHED).get("layers", ()))
        if not order or sorted(order) != list(range(len(order))):
            raise SpecError(
                f"calibration={self.calibration!r} of method 'shortv' is no ranking of layers. Write one with "
                "`vtc calibrate shortv --out layers.json`."
            )
        return len(order), order

    def stages(self) -> tuple[Stage, ...]:
        """All layers of the list; `stages_in` cuts it to the budget."""
        return _freeze(self.ranking()[1])

    def stages_in(self, layers: int) -> tuple[Stage, ...]:
        """The layers that are frozen in an LLM of `layers` layers.

        Raises:
            BudgetError: the budget counts tokens, leaves fewer layers than the list can, or is missing.
            SpecError: the list was made for another depth.
        """
        depth, order = self.ranking()
        if depth not in (None, layers):
            raise SpecError(
                f"calibration={self.calibration!r} of method 'shortv' is for {depth} decoder layers, and this model "
                f"has {layers}. Make one with `vtc calibrate shortv --model ... --out layers.json`, or name the "
                "layers: 'shortv@3|1'."
            )
        if self.budget is None:
            if depth is not None and len(order) == depth:
                raise BudgetError(
                    "method 'shortv' has no budget, and its list names every layer. Give the share of layers in which "
                    "visual tokens are updated: 'shortv:0.5'."
                )
            return _freeze(order)
        if self.budget.ratio is None:
            raise BudgetError(
                f"budget {self.budget} of method 'shortv' counts tokens, but no token leaves. Give the share of layers "
                "in which visual tokens are updated, e.g. 'shortv:0.5', or no budget at all, and token budgets to "
                "other methods only: 'shortv + fastv:64'."
            )
        count = layers - round(self.budget.ratio * layers)
        if count > len(order):
            raise BudgetError(
                f"budget {self.budget} of method 'shortv' freezes {count} of {layers} layers, and its list names "
                f"{len(order)}. Use a share of {1 - len(order) / layers:.2f} or more, or a calibration that ranks "
                "every layer (`vtc calibrate shortv`)."
            )
        return _freeze(order[:count])


def _freeze(layers: tuple[int, ...]) -> tuple[Stage, ...]:
    whole = Budget(ratio=1.0)
    return tuple(Stage(Site("layer", layer), nothing, leave=Freeze(), budget=whole) for layer in sorted(layers))
