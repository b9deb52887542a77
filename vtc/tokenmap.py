"""The decision of a stage: a row-sparse linear map from tokens to fewer tokens.

    out[b, k] = sum over edges e of group b with slot[e] == k:  weight[e] * x[b, source[e]]

Each slot has an *anchor*: the token whose place, and position id, it takes. A map without edges is a pure selection
and copies the anchors bit for bit. Maps are ragged over the batch (`lengths`), immutable, and building one never
waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.errors import InputError
from vtc.indices import follow, take
from vtc.kernels import segment_merge


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A batch of maps from `num_tokens` tokens to `lengths[b]` slots.

    Args:
        anchor: int64 [B, K], the token whose place slot k takes; -1 in padding, which comes last.
        lengths: slots of each group.
        num_tokens: tokens of the longest group on the input side, prefix included.
        source, slot, weight: [B, E] edges, or None for a pure selection; slot -1 is padding.
        mass: [B, E] share of the source token that this edge carries; sums to 1 over the edges of a token that was
            merged or kept. None: every token is split evenly over its edges.

    Example:
        >>> keep = torch.tensor([[0, 2]])
        >>> m = TokenMap.select(keep, num_tokens=4)
        >>> m.apply(torch.arange(4.0).reshape(1, 4, 1)).flatten().tolist()
        [0.0, 2.0]
    """

    anchor: Int[Tensor, "B K"]
    lengths: tuple[int, ...]
    num_tokens: int
    source: Int[Tensor, "B E"] | None = None
    slot: Int[Tensor, "B E"] | None = None
    weight: Float[Tensor, "B E"] | None = None
    mass: Float[Tensor, "B E"] | None = None

    def __post_init__(self) -> None:
        if self.anchor.dim() != 2 or self.anchor.shape[0] != len(self.lengths):
            raise InputError(f"anchor {tuple(self.anchor.shape)} does not fit {len(self.lengths)} groups.")
        edges = (self.source, self.slot, self.weight)
        if any(part is None for part in edges) != all(part is None for part in edges):
            raise InputError("source, slot and weight come together, or none of them.")

    @classmethod
    def select(cls, keep: Int[Tensor, "B K"], num_tokens: int, lengths: Sequence[int] | None = None) -> "TokenMap":
        """Keep the tokens `keep` (padding -1 last) and drop the rest."""
        return cls(keep, tuple(lengths) if lengths is not None else (keep.shape[1],) * keep.shape[0], num_tokens)

    @classmethod
    def identity(cls, lengths: Sequence[int], device: torch.device | None = None) -> "TokenMap":
        """Every token stays."""
        n = max(lengths, default=0)
        index = torch.arange(n, device=device).expand(len(lengths), -1)
        ends = torch.tensor(list(lengths), device=device)[:, None]
        return cls(torch.where(index < ends, index, -1), tuple(lengths), n)

    @property
    def is_selection(self) -> bool:
        """Whether no token is merged."""
        return self.source is None

    def apply(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B K D"]:
        """The tokens after the map, in the dtype of `x`; sums run in fp32; padding slots are 0."""
        if self.source is None or self.slot is None or self.weight is None:
            out = take(x, self.anchor)
            return out if len(set(self.lengths)) <= 1 else out.masked_fill((self.anchor < 0)[..., None], 0)
        return segment_merge(take(x, self.source), self.slot, self.anchor.shape[1], weights=self.weight, reduce="sum")

    def then(self, after: "TokenMap") -> "TokenMap":
        """One map that does what this one and then `after` do."""
        anchor = follow(self.anchor, after.anchor)
        if self.source is None or self.slot is None or self.weight is None:
            source = None if after.source is None else follow(self.anchor, after.source)
            return replace(after, anchor=anchor, num_tokens=self.num_tokens, source=source)
        if after.source is None:
            # the edges of dropped slots become padding, the others move to their new slot
            moved = torch.full_like(self.anchor, -1).scatter(
                1,
                after.anchor.clamp(min=0),
                torch.arange(after.anchor.shape[1], device=anchor.device).expand_as(after.anchor),
            )
            # padding of `after` was scattered to slot 0: put the true value back where slot 0 survived
            if after.anchor.shape[1]:
                first = (after.anchor == 0).long()
                moved[:, 0] = torch.where(first.any(1), first.argmax(1), -1)
            slot = follow(moved, self.slot)
            return TokenMap(anchor, after.lengths, self.num_tokens, self.source, slot, self.weight, self.masses())
        return self._product(after, anchor)

    def _product(self, after: "TokenMap", anchor: Int[Tensor, "B K"]) -> "TokenMap":
        """Every path token -> slot -> slot as an edge; the only place that asks the device for a count."""
        assert self.source is not None and self.slot is not None and self.weight is not None
        assert after.source is not None and after.slot is not None and after.weight is not None
        middle = self.anchor.shape[1]
        source = after.source.masked_fill(after.slot < 0, middle)
        source, order = source.sort(dim=1, stable=True)
        edge = torch.arange(source.shape[1], device=source.device)
        starts = torch.nn.functional.pad((source[:, 1:] != source[:, :-1]).long(), (1, 0))
        rank = edge - (starts * edge).cummax(dim=1).values
        paths = 1 + int(rank.masked_fill(source == middle, 0).max()) if rank.numel() else 1
        rank = rank.clamp(max=paths - 1)
        place = source * paths + rank  # edges of the padding land behind the last slot

        def table(values: Tensor, empty: int) -> Tensor:
            full = values.new_full((len(self.lengths), (middle + 1) * paths), empty)
            full = full.scatter(1, place, values.gather(1, order))[:, : middle * paths]
            reached = full.view(-1, middle, paths)
            index = self.slot.clamp(min=0)[..., None].expand(-1, -1, paths)  # type: ignore[union-attr]
            return reached.gather(1, index).flatten(1)

        def repeat(values: Tensor) -> Tensor:
            return values.repeat_interleave(paths, dim=1)

        slot = table(after.slot, -1).masked_fill(repeat(self.slot) < 0, -1)
        product = TokenMap(
            anchor,
            after.lengths,
            self.num_tokens,
            repeat(self.source),
            slot,
            repeat(self.weight) * table(after.weight, 0),
            repeat(self.masses()) * table(after.masses(), 0),
        )
        return product if paths == 1 else product._joined()

    def _joined(self) -> "TokenMap":
        """The same map with one edge for each pair of token and slot, so that long products do not grow."""
        assert self.source is not None and self.slot is not None and self.weight is not None
        last = self.anchor.shape[1] * self.num_tokens
        pair = torch.where(self.slot < 0, last, self.slot * self.num_tokens + self.source)
        pair, order = pair.sort(dim=1, stable=True)
        starts = torch.nn.functional.pad((pair[:, 1:] != pair[:, :-1]).long(), (1, 0))
        place = starts.cumsum(dim=1)
        real = pair < last
        width = int((place + 1).masked_fill(~real, 0).max()) if place.numel() else 0
        place = torch.where(real, place, width)  # padding lands in an extra column

        def total(values: Tensor) -> Tensor:
            out = values.new_zeros(values.shape[0], width + 1)
            return out.scatter_add(1, place, values.gather(1, order).masked_fill(~real, 0))[:, :width]

        pairs = torch.full_like(pair[:, : width + 1], -1).scatter(1, place, pair)[:, :width]
        source = torch.where(pairs < 0, 0, pairs % self.num_tokens)
        slot = torch.where(pairs < 0, -1, pairs // self.num_tokens)
        return replace(self, source=source, slot=slot, weight=total(self.weight), mass=total(self.masses()))

    def sizes(self) -> Float[Tensor, "B K"]:
        """How many input tokens each slot stands for (fractions where a token was split over slots)."""
        if self.slot is None:
            return (self.anchor >= 0).float()
        mass = self.masses()
        sizes = mass.new_zeros(*self.anchor.shape[:1], self.anchor.shape[1] + 1)
        return sizes.scatter_add(1, self.slot + 1, mass)[:, 1:]  # column 0 collects the padding

    def sources(self) -> Int[Tensor, "B N"]:
        """For each input token the slot it mainly went into, -1 where it was dropped."""
        heaviest = self.matrix(mass=True).max(dim=1)
        return torch.where(heaviest.values > 0, heaviest.indices, -1)

    def matrix(self, mass: bool = False) -> Float[Tensor, "B K N"]:
        """The map (or its mass) as a dense matrix, for tests and pictures."""
        batch, slots = self.anchor.shape
        dense = torch.zeros(batch, slots + 1, self.num_tokens, device=self.anchor.device)
        rows = torch.arange(batch, device=self.anchor.device)[:, None]
        if self.source is None or self.slot is None or self.weight is None:
            index = torch.arange(slots, device=self.anchor.device).expand_as(self.anchor)
            slot, source, value = torch.where(self.anchor < 0, -1, index), self.anchor, torch.ones_like(index).float()
        else:
            slot, source, value = self.slot, self.source, self.masses() if mass else self.weight.float()
        return dense.index_put((rows, slot + 1, source.clamp(min=0)), value, accumulate=True)[:, 1:]

    def raster(self) -> "TokenMap":
        """The same map with its slots in the order of their anchors (padding stays last)."""
        key = torch.where(self.anchor < 0, self.num_tokens, self.anchor)
        order = key.argsort(dim=1, stable=True)
        slot = self.slot
        if slot is not None:
            slot = follow(order.argsort(dim=1), slot)
        return replace(self, anchor=self.anchor.gather(1, order), slot=slot)

    def in_slot_order(self) -> "TokenMap":
        """The same features in the same order, on the same set of places taken in ascending order.

        Methods whose published code appends tokens at the end use this: sequence order then is slot order.
        """
        return replace(self, anchor=self.raster().anchor)

    def groups(self, index: Sequence[int]) -> "TokenMap":
        """The map of the groups `index`, in that order."""
        where = torch.as_tensor(list(index), device=self.anchor.device, dtype=torch.long)

        def pick(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[where]

        return TokenMap(
            self.anchor[where],
            tuple(self.lengths[i] for i in index),
            self.num_tokens,
            *(pick(part) for part in (self.source, self.slot, self.weight, self.mass)),
        )

    def masses(self) -> Float[Tensor, "B E"]:
        """The share of its token that each edge carries."""
        if self.mass is not None:
            return self.mass
        if self.source is None or self.slot is None:
            return (self.anchor >= 0).float()
        real = (self.slot >= 0).float()
        degree = real.new_zeros(real.shape[0], self.num_tokens).scatter_add(1, self.source.clamp(min=0), real)
        return real / take(degree, self.source).clamp(min=1)
