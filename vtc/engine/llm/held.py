"""What vtc knows about a KV cache that it shortened; lives on the cache object, so generations do not mix.

Host code sees the *logical* length, as if nothing had been dropped: positions, prompt slicing and second turns go
on unchanged. Masks are sized by what each layer really holds.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.engine.handover import ATTRIBUTE
from vtc.engine.host import cache as host
from vtc.engine.plan import Plan
from vtc.errors import StateError, UnsupportedFeatureError
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
        layers = each(self.layers, lambda held: replace(held, appended=more))
        return replace(self, length=self.length + more.number, layers=layers)

    def cut(self, cache: Any, kept: Mapping[int, tuple[Int[Tensor, "B K"], bool]]) -> "Memory":
        """Let layers keep some of their entries alone, in `cache` and in what is noted of it.

        `kept`: layer -> the entries that stay, -1 is padding, and whether no mask of the host knows that padding.
        """
        layers = list(self.layers)
        for index, (entries, ragged) in kept.items():
            host.select(cache, index, entries)
            layers[index] = layers[index].chosen(entries, ragged)
        reference = layers[self.plan.reference]
        if reference is not self.reference or self.plan.reference in self.plan.frozen:
            # places are counted among the entries of this layer, which are others now, or in another order
            where = invert(reference.columns, self.length)
            placed = [None if held is reference else follow(where, held.columns) for held in layers]
            layers = [replace(held, place=place) for held, place in zip(layers, placed, strict=True)]
        return replace(self, layers=tuple(layers))


#: the memory that the running forward of a patched model follows
READING: ContextVar[Memory | None] = ContextVar("vtc_reading", default=None)


def memory_of(cache: Any, plan: Plan, batch: int) -> Memory | None:
    """The memory of `cache`, or None for a cache that holds everything.

    Raises:
        StateError: the cache was made under another patch, or its batch changed.
    """
    memory: Memory | None = getattr(cache, ATTRIBUTE, None)
    if memory is None or host.held_length(cache) == 0:
        return None
    if memory.plan is not plan:
        raise StateError(
            "this KV cache was compressed under another patch (or was pickled, which cuts its tie to the patch). "
            "Continue under the patch that made it, or start with a new cache."
        )
    made_for = len(memory.reference.column)
    if made_for != batch:
        raise StateError(
            f"this compressed KV cache was made for {made_for} prompts and is used for {batch}. "
            "Expand the inputs before the first forward (num_return_sequences, num_beams), not the cache."
        )
    return memory


def remember(cache: Any, memory: Memory) -> None:
    """Attach `memory` to `cache` and let the cache report logical lengths."""
    setattr(cache, ATTRIBUTE, memory)
    # one width for every mask, that of the reference layer, whichever layer the host sizes it by
    host.answer(
        cache,
        length=_logical_length,
        offset=_reference_length,
        mask_sizes=_mask_sizes,
        crop=_crop,
        select=_select,
        reset=_forget,
    )


def check_cache(cache: Any) -> None:
    """Refuse caches whose entries cannot be dropped.

    Raises:
        UnsupportedFeatureError: a static cache.
    """
    if cache is not None and host.is_static(cache):
        raise UnsupportedFeatureError(
            f"{type(cache).__name__}: its entries have fixed places, so dropped tokens would still be attended to. "
            "Use the default DynamicCache (no cache_implementation='static')."
        )


def _reference_length(cache: Any, layer_idx: int = 0) -> int:
    return host.held_length(cache, getattr(cache, ATTRIBUTE).plan.reference)


def _mask_sizes(cache: Any, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    """What the host asks at every call: the place to notice that no hook of ours will cut what it makes.

    Raises:
        StateError: the call does not go through the patched model.
    """
    if READING.get() is not getattr(cache, ATTRIBUTE):
        raise StateError(
            "this KV cache is compressed, and the model that reads it is not the one whose patch made it (a patch that "
            "was taken off, a copy, or a language model called by itself), so it would read entries at wrong places. "
            "Continue with the patched model (inside the `with` block), or prefill again."
        )
    return _reference_length(cache) + query_length, 0


def _logical_length(cache: Any, layer_idx: int = 0) -> int:
    memory: Memory = getattr(cache, ATTRIBUTE)
    held = host.held_length(cache, layer_idx)
    return held and held - memory.layers[layer_idx].column.shape[1] + memory.length


def _crop(cache: Any, length: int | Tensor) -> None:
    """`cache.crop`, by logical columns: `-n` takes off the last n; n > 0 (older hosts) leaves the first n.

    Assisted decoding verifies its candidates together with the prompt, so what is cropped may be part of the memory.

    Raises:
        StateError: some of these columns were dropped, so layers would lose different tokens.
    """
    memory: Memory = getattr(cache, ATTRIBUTE)
    whole, length = _logical_length(cache), int(length)  # some hosts count on the device
    left = max(0, whole + length if length <= 0 else length)
    surplus = memory.length - left
    if surplus > 0:
        for held in memory.layers:
            last = held.column[:, -surplus:]
            if last.shape[1] < surplus or bool((last != torch.arange(left, memory.length, device=last.device)).any()):
                raise StateError(
                    f"the KV cache cannot be cropped to {left} tokens: visual tokens behind that place were dropped, "
                    "and layers hold different ones of them. Prefill again, or crop only what follows the last image."
                )
        setattr(cache, ATTRIBUTE, _cropped(memory, surplus))
    host.crop(cache, max(0, whole - left))


def _select(cache: Any, samples: Int[Tensor, " J"]) -> None:
    """The memory of other samples, or of the same in another order."""
    memory: Memory = getattr(cache, ATTRIBUTE)

    def chosen(held: Held) -> Held:
        place, shift, bias = (_rows(part, samples) for part in (held.place, held.shift, held.bias))
        return replace(held, column=held.column[samples.to(held.column.device)], place=place, shift=shift, bias=bias)

    changed = replace(memory, layers=each(memory.layers, chosen), shift=_rows(memory.shift, samples))
    setattr(cache, ATTRIBUTE, changed)


def _rows(part: Tensor | None, samples: Tensor) -> Tensor | None:
    return None if part is None else part[samples.to(part.device)]


def _forget(cache: Any) -> None:
    """An emptied cache is a new one."""
    delattr(cache, ATTRIBUTE)
    host.forget(cache)


def _cropped(memory: Memory, surplus: int) -> Memory:
    """`memory` without the last `surplus` columns, which every layer holds."""

    def shorter(held: Held) -> Held:
        place, bias = (None if part is None else part[:, :-surplus] for part in (held.place, held.bias))
        return replace(held, column=held.column[:, :-surplus], place=place, bias=bias)

    return replace(memory, length=memory.length - surplus, layers=each(memory.layers, shorter))


def each(layers: tuple[Held, ...], change: Callable[[Held], Held]) -> tuple[Held, ...]:
    """`change` of every layer; those that share their entries go on sharing them."""
    made = {id(held): change(held) for held in {id(held): held for held in layers}.values()}
    return tuple(made[id(held)] for held in layers)


def _extend(column: Int[Tensor, "B K"], start: int, count: int) -> Int[Tensor, "B J"]:
    if not count:
        return column
    dense = torch.arange(start, start + count, device=column.device).expand(column.shape[0], -1)
    return torch.cat([column, dense], dim=1)
