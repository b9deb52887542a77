"""What differs between image encoders that stand by themselves, without an LLM: recognised as families are.

A finder looks at one module and says where the parts of the encoder are that it is, or why that encoder cannot run on
fewer tokens. Finders live in `vtc.adapters`, one file per library, and are imported by name on first use.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.adapter import Attention, Halves, adapter_classes, unwrap
from vtc.errors import UnsupportedModelError


def _never() -> bool:
    return False


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Where the parts of an image encoder are.

    Args:
        name: its class and library, for messages and reports.
        tower: the module with the method `entry`, one call of which takes images through all blocks once.
        blocks: its pre-norm blocks, in order; each is called with the tokens [B, L, D] first and returns them.
        halves: the residual halves of a block.
        attention_of: the self-attention of a block.
        patches: the convolution that makes the patches, [B, D, height, width].
        num_prefix: [CLS], distillation and register tokens in front of the patches.
        has_cls: whether the first of them is [CLS].
        entry: the method; whatever `hidden_states` its output has are put on the full grid.
        implementation: its attention, as transformers names it; asked when images come.
        checkpoints: whether the blocks run under gradient checkpointing right now.
        masks: arguments of `entry` that hide tokens from each other.
        bypasses: methods of `tower` that hand out tokens between blocks; refused while the encoder is compressed.
    """

    name: str
    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    halves: Callable[[Any], Halves]
    attention_of: Callable[[Any], Attention]
    patches: nn.Module
    num_prefix: int
    has_cls: bool
    entry: str = "forward"
    implementation: Callable[[], str] = lambda: "sdpa"
    checkpoints: Callable[[], bool] = _never
    masks: tuple[str, ...] = ()
    bypasses: tuple[str, ...] = ()


Finder = Callable[[nn.Module], ImageEncoder | str | None]

_FINDERS: list[Finder] = []


def register_encoder(finder: Finder) -> Finder:
    """Decorator that makes a kind of encoder known.

    `finder(module)` returns the parts of the encoder that `module` is, the reason why this encoder cannot be
    compressed (words that complete the error message), or None for modules that it does not know.
    """
    _FINDERS.append(finder)
    return finder


def encoder_for(model: nn.Module) -> ImageEncoder:
    """The image encoder that a model is or holds.

    Raises:
        UnsupportedModelError: there is none, there are several, or the model has an LLM behind it.
    """
    families = adapter_classes()  # also imports the finders
    model = unwrap(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if any(kind in family.model_types for family in families):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an LLM behind its encoder. Use vtc.patch(model, ...), which also shortens the "
            "LLM's input; or pass the encoder alone."
        )
    found: dict[int, ImageEncoder] = {}
    reasons: list[str] = []
    for module in model.modules():
        for finder in _FINDERS:
            one = finder(module)
            if isinstance(one, str):
                reasons.append(f"{type(module).__name__}: {one}")
            elif one is not None:
                found.setdefault(id(one.tower), one)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(one.name for one in found.values())
        raise UnsupportedModelError(f"{type(model).__name__} holds {len(found)} encoders ({names}). Pass one of them.")
    if reasons:
        raise UnsupportedModelError("; ".join(dict.fromkeys(reasons)))
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no image encoder that vtc knows: CLIP, SigLIP, DINOv2, ViT or DeiT of "
        "transformers, VisionTransformer of timm or of open_clip. Others need pre-norm blocks, "
        "x + attention(norm(x)) and then x + mlp(norm(x)), whose attention takes an additive mask; "
        "vtc.encoders.register_encoder makes them known."
    )


@functools.cache
def methods_by_themselves() -> tuple[str, ...]:
    """Slugs of the methods that act inside the tower and nowhere else."""
    from vtc.catalogue.registry import method_class, methods

    return tuple(
        slug for slug in methods() if {stage.site.name for stage in method_class(slug)().stages()} == {"tower"}
    )
