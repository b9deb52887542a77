"""One forward of the language model: what came in, what is left, and what each layer must see."""

from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vtc.engine.handover import Encoded
from vtc.engine.llm.held import Memory
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan
from vtc.tokens import Layout


class LayerState(NamedTuple):
    """What a layer saw of the new tokens.

    Args:
        column: [B, R] columns of its keys, in their order; None: all.
        place: [B, R] their rows at the door; None: the same.
        ragged: whether there is padding that no mask of the host knows.
        shift: [B] how far the positions of later tokens are moved in this layer (`positions="renumber"`); None: 0.
        visual: the visual tokens that were left; None: no image in this call.
    """

    column: Tensor | None
    place: Tensor | None
    ragged: bool
    shift: Tensor | None = None
    visual: Visual | None = None


@dataclass(eq=False)
class Parked:
    """The rows that were current when tokens were parked; they are it again before layer `until`."""

    until: int
    hidden: Tensor
    visual: Visual
    column: Tensor | None
    row_of: Tensor | None
    place: Tensor | None
    ragged: bool


@dataclass(eq=False)
class Forward:
    """Mutable state of one call; cleared when the call ends, also by an exception.

    Columns are counted among the new tokens of this call; rows are places in the current hidden states.
    """

    plan: Plan
    input_ids: Tensor | None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    candidates: int = 0  # last columns that assisted decoding guessed: dropped like text, but read by no signal
    mask: Tensor | None = None  # the 2-D mask that the inner model got, where it builds the masks of the layers
    token: "Token[Forward | None] | None" = None

    # what came in
    batch: int = 0
    length: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: Any = None
    memory: Memory | None = None
    past: int = 0  # logical columns before this call
    dense: int = 0  # of those, tokens that follow the memory's compressed part
    held: int = 0  # entries of the reference layer before this call
    valid: Bool[Tensor, "B S"] | None = None  # the prompt's 2-D mask over the new columns; None: all valid
    past_valid: Bool[Tensor, "B P"] | None = None
    is_visual: Bool[Tensor, "B S"] | None = None
    valid_counts: list[int] = field(default_factory=list)  # valid columns of each sample

    # what is left
    visual: Visual | None = None
    layout: Layout | None = None  # of the uncompressed tokens of each group that came in
    column: Int[Tensor, "B R"] | None = None  # rows -> columns; None while nothing was dropped
    row_of: Int[Tensor, "B S"] | None = None  # columns -> rows, -1 for dropped ones
    ragged: bool = False  # rows are padded because samples keep different numbers

    # what layers need
    door_column: Int[Tensor, "B R"] | None = None
    door_row_of: Int[Tensor, "B S"] | None = None
    door_ragged: bool = False
    place: Int[Tensor, "B R"] | None = None  # rows -> rows at the door; None until a layer dropped something
    positions: Tensor | None = None  # of the rows at the door
    door_rank: Int[Tensor, "B R"] | None = None  # how many tokens stand before each row at the door (renumber)
    door_valid: Int[Tensor, " B"] | None = None  # how many they are
    parked: "Parked | None" = None
    unmerging: Any = None  # vtc.engine.llm.unmerge.Unmerging: rows and columns of virtual unmerging
    live: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # frozen layer -> its input, its live rows
    shift: Int[Tensor, " B"] | None = None
    shared: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)  # arguments cut once for many layers
    carried: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # encoder signals over columns [B, S + 1, ...]
    door_embeds: Tensor | None = None  # embeddings of the prompt after the stages at `llm_in`
    door_visual: Visual | None = None
    layer_arguments: dict[int, dict[str, Any]] = field(default_factory=dict)  # of layers whose attention is read
    captured: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    # what was done
    layer_state: dict[int, LayerState] = field(default_factory=dict)
    visual_lengths: dict[int, list[int]] = field(default_factory=dict)
    awake: dict[int, list[int]] = field(default_factory=dict)  # frozen layer -> visual tokens that ask there
    seconds: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the current hidden states."""
        return self.length if self.column is None else self.column.shape[1]

    @property
    def door_rows(self) -> int:
        """Rows that entered the first layer."""
        return self.length if self.door_column is None else self.door_column.shape[1]

    def columns(self) -> Int[Tensor, "B R"]:
        """Columns of the current rows, also while nothing was dropped."""
        return self.column if self.column is not None else self.arange(self.length)

    def valid_rows(self) -> Bool[Tensor, "B R"]:
        """Which current rows are neither the prompt's padding nor ours."""
        column = self.columns()
        valid = column >= 0
        return valid if self.valid is None else valid & self.valid.gather(1, column.clamp(min=0))

    def read_rows(self) -> Bool[Tensor, "B R"]:
        """Which current rows signals may read: the valid ones without the candidates of assisted decoding."""
        return self.valid_rows() & (self.columns() < self.length - self.candidates)

    def valid_totals(self) -> list[int]:
        """How many tokens each sample has left, without asking the device."""
        assert self.visual is not None
        before = self.visual.per_sample(self.batch, [sum(images) for images in self.visual.origin])
        after = self.visual.per_sample(self.batch)
        return [n - b + a for n, b, a in zip(self.valid_counts, before, after, strict=True)]

    def shorten(self) -> None:
        """Make the surviving columns the current ones: all text, and the visual tokens that are left.

        The prompt's own padding goes too: nobody looks at it, and a batch is as long as its longest sample.
        """
        assert self.visual is not None and self.is_visual is not None
        keep = ~self.is_visual | self.visual.is_kept(self.batch, self.length)
        if self.valid is not None:
            keep = keep & self.valid
        totals = self.valid_totals()
        self.column = compact_columns(keep, totals)
        self.row_of = inverse_columns(self.column, self.length)
        self.ragged = len(set(totals)) > 1
        self.shared.clear()

    def park(self, hidden: Tensor, before: Visual, until: int) -> None:
        """Remember the current rows, of which `self.visual` no longer has all of `before`."""
        self.parked = Parked(until, hidden, before, self.column, self.row_of, self.place, self.ragged)

    def restore(self, hidden: Tensor) -> Tensor:
        """The rows from before the parking: those that went on have changed, the others are what they were."""
        parked = self.parked
        assert parked is not None
        rows = lookup(parked.row_of, self.columns())
        self.visual, self.column, self.row_of = parked.visual, parked.column, parked.row_of
        self.place, self.ragged, self.parked = parked.place, parked.ragged, None
        self.shared.clear()
        return put(parked.hidden, rows, hidden)

    def arange(self, count: int, start: int = 0) -> Int[Tensor, "B J"]:
        """`start .. start + count - 1` for each sample."""
        return torch.arange(start, start + count, device=self.device).expand(self.batch, -1)


FORWARD: ContextVar[Forward | None] = ContextVar("vtc_forward", default=None)


def cut_forward() -> Forward | None:
    """The running forward, where it may have other rows or entries than its host thinks."""
    state = FORWARD.get()
    return None if state is None or (state.visual is None and state.memory is None) else state


class Outer(NamedTuple):
    """What only the running call of the outer model knows.

    Args:
        candidates: tokens that assisted decoding appended to the prompt.
        encoded: what was decided about the features handed over; accelerate's hooks rebuild the objects that carry it.
    """

    candidates: int = 0
    encoded: Mapping[str, Encoded | None] = MappingProxyType({})


NO_OUTER = Outer()
OUTER: ContextVar[Outer] = ContextVar("vtc_outer", default=NO_OUTER)


def lookup(table: Int[Tensor, "B S"] | None, index: Int[Tensor, "B R"]) -> Int[Tensor, "B R"]:
    """`table[index]` (None: the identity); -1 stays -1."""
    if table is None:
        return index
    return table.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)


def take(x: Tensor, index: Int[Tensor, "B R"], dim: int = 1) -> Tensor:
    """Rows `index` of `x` along `dim`; index -1 reads row 0, which the mask hides."""
    index = index.clamp(min=0).to(x.device)
    if dim == -1:  # position ids: [B, S] or [axes, B, S]
        return x.expand(*x.shape[:-2], index.shape[0], -1).gather(-1, index.expand(*x.shape[:-2], -1, -1))
    return x.expand(index.shape[0], *x.shape[1:]).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def put(x: Tensor, index: Int[Tensor, "B R"], values: Tensor) -> Tensor:
    """`x` with its rows `index` replaced by `values` (a new tensor); index -1 is padding."""
    target = torch.where(index < 0, x.shape[1], index).to(x.device)  # padding lands in an extra row
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1)
    return padded.scatter(1, target[..., None].expand(-1, -1, x.shape[2]), values)[:, :-1]


def compact_columns(keep: Bool[Tensor, "B S"], counts: list[int]) -> Int[Tensor, "B R"]:
    """The columns that stay, in order, padded on the left with -1 to the longest row; `counts` are the row sums."""
    batch, length = keep.shape
    rows = max(counts)
    pad = torch.tensor([rows - n for n in counts], device=keep.device)[:, None]
    target = torch.where(keep, keep.long().cumsum(1) - 1 + pad, rows)  # dropped columns land in an extra place
    out = torch.full((batch, rows + 1), -1, device=keep.device)
    source = torch.arange(length, device=keep.device).expand(batch, -1)
    return out.scatter(1, target, source)[:, :rows]


def inverse_columns(column: Int[Tensor, "B R"], length: int) -> Int[Tensor, "B S"]:
    """For each column its row, -1 where it was dropped."""
    batch, rows = column.shape
    out = torch.full((batch, length + 1), -1, device=column.device)
    target = torch.where(column < 0, length, column)
    return out.scatter(1, target, torch.arange(rows, device=column.device).expand(batch, -1))[:, :length]
