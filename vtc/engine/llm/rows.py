"""Which tokens of a prompt the rows of some hidden states are: the one value that says what is left."""

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vtc.engine.llm.held import Held
from vtc.engine.llm.prompt import Prompt
from vtc.engine.llm.visual import Visual
from vtc.indices import compact, follow, invert, shift, take


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of the hidden states at one point of a call.

    Args:
        prompt: whose tokens they are.
        visual: the visual tokens among them; None: no image came with this call.
        column: int64 [B, R], the column of each row, -1 where it is padding; None: every column, in order.
        place: int64 [B, R], the row of each at the door, -1 in padding; None: these are the rows at the door.
        ragged: whether there is padding that no mask of the host knows.
    """

    prompt: Prompt
    visual: Visual | None = None
    column: Int[Tensor, "B R"] | None = None
    place: Int[Tensor, "B R"] | None = None
    ragged: bool = False

    @property
    def count(self) -> int:
        """Rows of each sample, padding included."""
        return self.prompt.length if self.column is None else self.column.shape[1]

    @functools.cached_property
    def columns(self) -> Int[Tensor, "B R"]:
        """Their columns, also where these are all."""
        return self.prompt.arange(self.prompt.length) if self.column is None else self.column

    @functools.cached_property
    def row_of(self) -> Int[Tensor, "B S"] | None:
        """For each column its row, -1 where it was dropped; None: every column is the row of its own number."""
        return None if self.column is None else invert(self.column, self.prompt.length)

    @functools.cached_property
    def valid(self) -> Bool[Tensor, "B R"]:
        """Which rows are neither the prompt's padding nor ours."""
        valid = self.columns >= 0
        given = self.prompt.valid
        return valid if given is None else valid & take(given, self.columns)

    @functools.cached_property
    def readable(self) -> Bool[Tensor, "B R"]:
        """Which rows signals may read: the valid ones without the candidates of assisted decoding."""
        return self.valid & (self.columns < self.prompt.length - self.prompt.candidates)

    @functools.cached_property
    def rank(self) -> Int[Tensor, "B R"]:
        """How many tokens stand before each row."""
        valid = self.valid.long()
        return valid.cumsum(1) - valid

    @property
    def totals(self) -> list[int]:
        """How many tokens each sample has, without asking the device."""
        assert self.visual is not None
        batch = self.prompt.batch
        before = self.visual.per_sample(batch, [sum(images) for images in self.visual.origin])
        after = self.visual.per_sample(batch)
        return [n - b + a for n, b, a in zip(self.prompt.valid_counts, before, after, strict=True)]

    def within(self, other: "Rows") -> Int[Tensor, "B R"]:
        """Where these rows stand among those of `other`, -1 where they do not."""
        return follow(other.row_of, self.columns)

    def entries(self, before: Held | None) -> Int[Tensor, "B N"]:
        """Places of all entries of a layer that sees these rows, behind what it held `before` this call."""
        prompt = self.prompt
        held = None if before is None else before.places
        held = prompt.arange(prompt.held) if held is None else held
        new = prompt.arange(self.count) if self.place is None else self.place
        return torch.cat([held, shift(new, prompt.held)], dim=1)

    def with_visual(self, visual: Visual) -> "Rows":
        """The same rows, of whose visual tokens others are left or merged."""
        return replace(self, visual=visual)

    def cut(self, door: "Rows | None" = None) -> "Rows":
        """All text and the visual tokens that are left, among them none of the prompt's padding.

        Nobody looks at that padding, and a batch is as long as its longest sample. `door`: the rows that entered the
        first layer; None: these will be.
        """
        prompt, visual = self.prompt, self.visual
        assert visual is not None and prompt.is_visual is not None
        keep = ~prompt.is_visual | visual.is_kept(prompt.batch, prompt.length)
        if prompt.valid is not None:
            keep = keep & prompt.valid
        totals = self.totals
        left = replace(self, column=compact(keep, totals), place=None, ragged=len(set(totals)) > 1)
        return left if door is None else replace(left, place=left.within(door))

    def ordered(self, order: Int[Tensor, "B R"], ragged: bool) -> "Rows":
        """The rows `order` of these."""
        place = order if self.place is None else follow(self.place, order)
        return replace(self, column=follow(self.columns, order), place=place, ragged=ragged)
