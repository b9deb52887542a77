"""One forward of the language model: what came in, what is left, and what was captured on the way."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from vtc.engine.handover import Encoded
from vtc.engine.llm.prompt import Prompt
from vtc.engine.llm.rows import Rows
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan
from vtc.indices import put


class Parked(NamedTuple):
    """The rows that were current when tokens were parked; they are it again before layer `until`."""

    until: int
    hidden: Tensor
    rows: Rows


@dataclass(eq=False)
class Forward:
    """Mutable state of one call; cleared when the call ends, also by an exception."""

    plan: Plan
    ids: Tensor | None  # [B, S], as the inner model got them
    candidates: int = 0  # last columns that assisted decoding guessed
    mask: Tensor | None = None  # the 2-D mask that the inner model got, where it builds the masks of the layers
    encoded: dict[str, Encoded] = field(default_factory=dict)  # by modality

    # which rows are left
    prompt: Prompt | None = None  # None until the language model is called
    rows: Rows | None = None  # now
    door: Rows | None = None  # that entered the first layer
    seen: dict[int, Rows] = field(default_factory=dict)  # that each layer's cache has, in its order
    parked: Parked | None = None
    live: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # frozen layer -> its input, its live rows
    unmerging: Any = None  # vtc.engine.llm.unmerge.Unmerging: rows and columns of virtual unmerging

    # what layers need
    positions: Tensor | None = None  # of the rows at the door
    shift: Tensor | None = None  # [B], how far the door moved the positions of what follows
    shared: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)  # arguments cut once for many layers

    # what signals are made of
    carried: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # encoder signals over columns [B, S + 1, ...]
    embeds: Tensor | None = None  # [B, S, D] of the prompt after the stages at `llm_in`
    embedded: Visual | None = None  # the visual tokens among them, one group per sample
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)  # of layers whose attention is read
    captured: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    # what was done
    visual_lengths: dict[int, list[int]] = field(default_factory=dict)  # of each sample, from a layer on
    awake: dict[int, list[int]] = field(default_factory=dict)  # frozen layer -> visual tokens that ask there
    seconds: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def visual(self) -> Visual | None:
        """The visual tokens that are left; None: no image came with this call, or it has not come to the door."""
        return None if self.rows is None else self.rows.visual

    def go_on(self, rows: Rows) -> None:
        """Make `rows` the current ones; what was cut for others is not theirs."""
        self.rows = rows
        self.shared.clear()

    def note_lengths(self, layer: int) -> None:
        """Note how many visual tokens each sample has from `layer` on."""
        assert self.prompt is not None and self.visual is not None
        self.visual_lengths[layer] = self.visual.per_sample(self.prompt.batch)

    def unpark(self, hidden: Tensor) -> Tensor:
        """The rows from before the parking: those that went on have changed, the others are what they were."""
        assert self.parked is not None and self.rows is not None
        _, before, rows = self.parked
        changed = self.rows.within(rows)
        self.parked = None
        self.go_on(rows)
        return put(before, changed, hidden)


FORWARD: ContextVar[Forward | None] = ContextVar("vtc_forward", default=None)


def compressed_forward() -> Forward | None:
    """The running forward with visual tokens at the door."""
    state = FORWARD.get()
    return None if state is None or state.visual is None else state


def cut_forward() -> Forward | None:
    """The running forward, where it may have other rows or entries than its host thinks."""
    state = FORWARD.get()
    if state is None or state.rows is None:
        return None
    return None if state.rows.visual is None and state.rows.prompt.memory is None else state


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
