"""What each layer of a KV cache holds: entries that stages left, and those that were appended since."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.engine.host import cache as host
from vtc.engine.plan import Plan
from vtc.indices import follow, invert, take


class Appended(NamedTuple):
    """Entries behind those that were decided about: how many, and the first one's column and place."""

    number: int = 0
    column: int = 0
    place: int = 0


NOTHING = Appended()


@dataclass(frozen=True, eq=False)
class Held:
    """The entries of one layer.

    Args:
        column: int64 [B, K] logical column of each entry; -1 where the entry is padding.
        place: int64 [B, K] place of each entry among those of the reference layer; None: the same entries.
        ragged: whether there is padding that no mask of the host knows.
        shift: int64 [B], how far this layer moves positions beyond `Memory.shift`; None: not at all.
        bias: float32 [B, K], log(size) of each entry (`size_bias`); None: 0 for all.
        appended: entries that the layer got since, which no decision was about.
    """

    column: Int[Tensor, "B K"]
    place: Int[Tensor, "B K"] | None
    ragged: bool
    shift: Int[Tensor, " B"] | None = None
    bias: Float[Tensor, "B K"] | None = None
    appended: Appended = NOTHING

    @property
    def entries(self) -> int:
        """How many there are, those appended included."""
        return self.column.shape[1] + self.appended.number

    @functools.cached_property
    def columns(self) -> Int[Tensor, "B N"]:
        """`column` of all entries."""
        return _extend(self.column, self.appended.column, self.appended.number)

    @functools.cached_property
    def places(self) -> Int[Tensor, "B N"] | None:
        """`place` of all entries."""
        return None if self.place is None else _extend(self.place, self.appended.place, self.appended.number)

    @functools.cached_property
    def biases(self) -> Float[Tensor, "B N"] | None:
        """`bias` of all entries."""
        return None if self.bias is None else torch.nn.functional.pad(self.bias, (0, self.appended.number))

    @property
    def settled(self) -> "Held":
        """The same entries, all of them decided about."""
        if not self.appended.number:
            return self
        return Held(self.columns, self.places, self.ragged, self.shift, self.biases)

    def chosen(self, entries: Int[Tensor, "B K"], ragged: bool) -> "Held":
        """What is held once the layer keeps `entries` of these alone; -1 is padding."""
        place = entries if self.places is None else follow(self.places, entries)
        bias = None if self.biases is None else take(self.biases, entries)
        return Held(follow(self.columns, entries), place, ragged or self.ragged, self.shift, bias)


@dataclass(frozen=True, eq=False)
class Memory:
    """What each layer of a cache holds, up to the last token that something was decided about.

    Args:
        plan: whose decisions these are.
        length: logical columns that are covered.
        layers: what each layer holds of them.
        shift: int64 [B], how far positions were moved together (`positions="compact"`).
    """

    plan: Plan
    length: int
    layers: tuple[Held, ...]
    shift: Int[Tensor, " B"] | None

    @property
    def reference(self) -> Held:
        """The entries that masks of the host are sized by."""
        return self.layers[self.plan.reference]

    def grown(self, entries: int) -> "Memory":
        """The same, with what every layer got since: the reference layer has `entries` by now."""
        place = self.reference.column.shape[1]
        more = Appended(entries - place, self.length, place)
        if not more.number:
            return self
        layers = _each(self.layers, lambda held: replace(held, appended=more))
        return replace(self, length=self.length + more.number, layers=layers)

    def cut(self, cache: Any, kept: Mapping[int, tuple[Int[Tensor, "B K"], bool]]) -> "Memory":
        """Let layers keep some of their entries alone, in `cache` and in what is noted of it.

        `kept`: layer -> the entries that stay, -1 is padding, and whether no mask of the host knows that padding. The
        reference layer must go on holding what any other layer holds, since masks are cut out of its own.
        """
        layers = list(_each(self.layers, lambda held: held.settled))
        for index, (entries, ragged) in kept.items():
            host.select(cache, index, entries)
            layers[index] = layers[index].chosen(entries, ragged)
        reference = layers[self.plan.reference]
        if self.plan.reference in kept or self.plan.reference in self.plan.frozen:
            # places are counted among the entries of this layer, which are others now, or in another order
            where = invert(reference.columns, self.length)
            placed = [None if held is reference else follow(where, held.columns) for held in layers]
            layers = [replace(held, place=place) for held, place in zip(layers, placed, strict=True)]
        return replace(self, layers=tuple(layers))

    def of(self, samples: Int[Tensor, " J"]) -> "Memory":
        """The same of other samples, or of these in another order."""

        def chosen(held: Held) -> Held:
            place, shift, bias = (_rows(part, samples) for part in (held.place, held.shift, held.bias))
            return replace(
                held, column=held.column[samples.to(held.column.device)], place=place, shift=shift, bias=bias
            )

        return replace(self, layers=_each(self.layers, chosen), shift=_rows(self.shift, samples))

    def without_last(self, surplus: int) -> "Memory":
        """The same without the last `surplus` columns, which every layer holds."""

        def shorter(held: Held) -> Held:
            place, bias = (None if part is None else part[:, :-surplus] for part in (held.place, held.bias))
            return replace(held, column=held.column[:, :-surplus], place=place, bias=bias)

        return replace(self, length=self.length - surplus, layers=_each(self.layers, shorter))


def _rows(part: Tensor | None, samples: Tensor) -> Tensor | None:
    return None if part is None else part[samples.to(part.device)]


def _each(layers: tuple[Held, ...], change: Callable[[Held], Held]) -> tuple[Held, ...]:
    """`change` of every layer; those that share their entries go on sharing them."""
    made = {id(held): change(held) for held in {id(held): held for held in layers}.values()}
    return tuple(made[id(held)] for held in layers)


def _extend(column: Int[Tensor, "B K"], start: int, count: int) -> Int[Tensor, "B J"]:
    if not count:
        return column
    dense = torch.arange(start, start + count, device=column.device).expand(column.shape[0], -1)
    return torch.cat([column, dense], dim=1)
