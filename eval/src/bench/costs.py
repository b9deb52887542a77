"""FLOPs of the vision encoder by formula, with the token counts that a forward really had.

    linear layer             2 * rows * inputs * outputs
    convolution              2 * outputs * weights per output
    attention of one block   4 * sum over segments of (tokens of the segment)^2 * width

Rows and segments (tiles, frames, windows) are read off while the encoder runs, so one rule covers fixed grids, tiles,
images of any size, window attention, and tokens that a method merges inside the tower. Norms, rotations, softmax and
resizing are not counted; neither is what a method computes to decide. `vtc.flops` counts the language model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.adapter import Adapter, Encoder
from vtc.engine.host import names
from vtc.errors import UnsupportedModelError


@dataclass
class EncoderFlops:
    """FLOPs of what was observed, summed over the batch."""

    tower: int = 0
    projector: int = 0

    def add(self, part: str, flops: int) -> None:
        """Count `flops` for "tower" or "projector"."""
        setattr(self, part, getattr(self, part) + flops)


def projector_of(adapter: Adapter, encoder: Encoder) -> nn.Module | None:
    """The module that brings features to the LLM's width; None where a family has no such module."""
    if encoder.features is not None:
        return encoder.features
    return getattr(adapter.inner, "multi_modal_projector", None) or getattr(encoder.tower, "merger", None)


def is_part(module: nn.Module | None, whole: nn.Module) -> bool:
    """Whether `module` lies inside `whole`."""
    return module is not None and any(part is module for part in whole.modules())


@contextmanager
def observed_encoder(adapter: Adapter) -> Iterator[EncoderFlops]:
    """Add up the FLOPs of every encoder call inside the block; video towers included.

    Raises:
        UnsupportedModelError: the adapter does not name the blocks of a tower.
    """
    if not all(encoder.blocks for encoder in adapter.encoders):
        raise UnsupportedModelError(
            f"the adapter of {adapter.family} does not name the blocks of its tower, whose attention would be left out "
            "of the FLOPs. Set Encoder(blocks=...)."
        )
    total = EncoderFlops()
    watches: dict[tuple[nn.Module, str], Any] = {}
    for encoder in adapter.encoders:
        projector = projector_of(adapter, encoder)
        # the projector first: one that lies inside the tower is not counted again as a part of it
        for part, root in (("projector", projector), ("tower", encoder.tower)):
            for module in root.modules() if root is not None else ():
                if (module, "weights") not in watches:
                    watches[module, "weights"] = module.register_forward_hook(_weights(part, total))
        width = encoder.attention.num_heads * encoder.attention.head_dim
        for block in encoder.blocks:
            if (block, "attention") not in watches:
                hook = block.register_forward_pre_hook(_attention(width, total), with_kwargs=True)
                watches[block, "attention"] = hook
    try:
        yield total
    finally:
        for watch in watches.values():
            watch.remove()


def _weights(part: str, total: EncoderFlops) -> Callable[..., None]:
    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            total.add(part, 2 * output.numel() * module.in_features)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            total.add(part, 2 * output.numel() * module.weight[0].numel())
        else:  # a bare matrix [inputs, outputs], as Gemma 3's projector holds it
            for name, weight in module.named_parameters(recurse=False):
                if name.endswith("projection_weight"):
                    total.add(part, 2 * output.numel() * weight.shape[0])

    return count


def _attention(width: int, total: EncoderFlops) -> Callable[..., None]:
    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden: Tensor = names.hidden_argument(args, kwargs)
        ends = kwargs.get("cu_seqlens")
        segments = [hidden.shape[1]] * hidden.shape[0] if ends is None else ends.diff().tolist()
        total.tower += 4 * width * sum(n * n for n in segments)

    return count
