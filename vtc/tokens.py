"""What a stage sees: a batch of groups of visual tokens, and the budget for each group.

A *group* is what the budget counts: an image, a tile, a frame, a video, or all visual tokens of a sample. Groups of
different length are padded on the right; the lengths are host integers, so nothing here waits for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.budget import Budget as Budget
from vtc.errors import InputError, SignalUnavailableError
from vtc.indices import follow


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each token of a group lies on its image or video.

    Args:
        row, col: int64 [B, N], place on the grid of the token's segment; -1 for separators and padding.
        segment: int64 [B, N], tile or frame number within the group, counted from 0.
        grids: for each group, the (height, width) of each of its segments, as host integers.
    """

    row: Int[Tensor, "B N"]
    col: Int[Tensor, "B N"]
    segment: Int[Tensor, "B N"]
    grids: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def grid(cls, height: int, width: int, groups: int = 1, segments: int = 1, device: object = None) -> "Layout":
        """`groups` equal groups, each of `segments` full raster grids of `height` x `width` tokens."""
        index = torch.arange(segments * height * width, device=device)  # type: ignore[call-overload]
        place = index % (height * width)
        parts = [place // width, place % width, index // (height * width)]
        row, col, segment = (part.expand(groups, -1) for part in parts)
        return cls(row, col, segment, (((height, width),) * segments,) * groups)

    def take(self, index: Int[Tensor, "B K"]) -> "Layout":
        """The layout of the tokens `index` (-1 stays -1)."""
        return self.map(lambda part: follow(part, index))

    def groups(self, index: Sequence[int]) -> "Layout":
        """The layout of the groups `index`, in that order."""
        where = torch.as_tensor(index, device=self.row.device)
        return replace(self.map(lambda part: part[where]), grids=tuple(self.grids[i] for i in index))

    def to(self, device: torch.device) -> "Layout":
        """The same layout on `device`."""
        return self.map(lambda part: part.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Layout":
        """The layout after `function` on each of row, col and segment."""
        return Layout(function(self.row), function(self.col), function(self.segment), self.grids)


class Medium(NamedTuple):
    """One image or video of a prompt, or a tile where the encoder takes each for an image.

    Args:
        modality: "image" or "video".
        number: which of the images or videos that the encoder got; beams repeat them.
        sample: batch row of the prompt.
        tokens: how many it has uncompressed.
    """

    modality: str
    number: int
    sample: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of groups of visual tokens with the signals that a stage declared.

    Args:
        x: [B, N, D] features at the stage's site, valid tokens first, padding after them.
        lengths: valid tokens of each group.
        layout: places on the grid, where the host has one.
        signals: name -> tensor, batch first, padded like `x`.
        num_prefix: leading tokens of `x` that are no visual token of the LLM (a [CLS]); they may be merged into
            others or take the place of a dropped token, and are not counted by `lengths`.
        budget: tokens that remain in each group (adaptive methods: at most).

    Raises:
        InputError: shapes that do not fit each other.
    """

    x: Float[Tensor, "B N D"]
    lengths: tuple[int, ...]
    layout: Layout | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    num_prefix: int = 0
    budget: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.x.dim() != 3 or len(self.lengths) != self.x.shape[0]:
            raise InputError(f"tokens of shape {tuple(self.x.shape)} do not fit {len(self.lengths)} groups [B, N, D].")
        if self.lengths and max(self.lengths) + self.num_prefix != self.x.shape[1]:
            raise InputError(
                f"the longest group has {max(self.lengths)} tokens (+{self.num_prefix} prefix), x {self.x.shape[1]}."
            )

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "B N D"],
        budget: int,
        layout: Layout | None = None,
        num_prefix: int = 0,
        **signals: Tensor,
    ) -> "Tokens":
        """Equal groups of which `budget` tokens remain, as tests and notebooks need them."""
        batch, length = x.shape[0], x.shape[1] - num_prefix
        return cls(x, (length,) * batch, layout, signals, num_prefix, (budget,) * batch)

    @cached_property
    def mask(self) -> Bool[Tensor, "B N"]:
        """True where `x` holds a valid token (prefix included)."""
        ends = torch.tensor(self.ends, device=self.x.device)
        return torch.arange(self.x.shape[1], device=self.x.device) < ends[:, None]

    @property
    def is_padded(self) -> bool:
        return len(set(self.lengths)) > 1

    def signal(self, name: str) -> Tensor:
        """The captured signal `name`.

        Raises:
            SignalUnavailableError: the stage did not declare it, or a caller built the tokens without it.
        """
        if name not in self.signals:
            have = ", ".join(sorted(self.signals)) or "none"
            raise SignalUnavailableError(
                f"signal {name!r} was not captured (captured: {have}). Declare it in the stage."
            )
        return self.signals[name]

    def groups(self, index: Sequence[int]) -> "Tokens":
        """The groups `index`, the longest one among them, in that order."""
        rows = torch.as_tensor(list(index), device=self.x.device)
        return Tokens(
            self.x[rows],
            tuple(self.lengths[i] for i in index),
            None if self.layout is None else self.layout.groups(index),
            {name: value[rows] for name, value in self.signals.items()},
            self.num_prefix,
            tuple(self.budget[i] for i in index),
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Valid rows of `x` in each group, prefix included."""
        return tuple(n + self.num_prefix for n in self.lengths)
