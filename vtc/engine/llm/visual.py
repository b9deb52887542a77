"""Which visual tokens are left in the running forward, and in which columns of the prompt they stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.engine.decide import budgets, run_step
from vtc.engine.plan import Step
from vtc.errors import InputError
from vtc.indices import follow, shift
from vtc.stages import Schedule
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout, Tokens


@dataclass(frozen=True, eq=False)
class Visual:
    """Groups of visual tokens of a batch of prompts.

    Args:
        column: int64 [G, N], column of each surviving token among the new columns of the prompt; -1 is padding.
        lengths: surviving tokens of each group.
        sample: the batch row of each group.
        origin: for each group, the uncompressed length of each image in it.
        layout: places on the grid.
        token_map: everything that was decided so far, from uncompressed tokens to what is left.
    """

    column: Int[Tensor, "G N"]
    lengths: tuple[int, ...]
    sample: tuple[int, ...]
    origin: tuple[tuple[int, ...], ...]
    layout: Layout
    token_map: TokenMap

    @classmethod
    def locate(
        cls,
        is_visual: Bool[Tensor, "B S"],
        lengths: Sequence[int],
        layout: Layout,
        counts: Sequence[int],
        modality: str = "image",
    ) -> "tuple[Visual, list[int]]":
        """Match images of `lengths` tokens, in order, with the placeholders of each prompt (`counts` per row).

        Beam search and `num_return_sequences` repeat each prompt, and with it its whole group of images; the second
        result says which image each group is.

        Raises:
            InputError: the images do not fill the placeholders.
        """
        total, given = sum(counts), sum(lengths)
        if given == 0 or total % given:
            raise _mismatch(total, given, len(lengths), modality)
        repeats = total // given
        chosen: list[int] = []
        sample: list[int] = []
        offset: list[int] = []
        image = 0
        for row in range(0, len(counts), repeats):
            first, filled = image, 0
            while filled < counts[row]:
                if image == len(lengths):
                    raise _mismatch(total, given, len(lengths), modality)
                filled += lengths[image]
                image += 1
            if filled != counts[row] or any(counts[r] != filled for r in range(row, min(row + repeats, len(counts)))):
                raise InputError(
                    f"prompt {row} has {counts[row]} {modality} placeholders, but its {modality}s give {filled} "
                    f"tokens. Let the processor make the prompt, one {modality} token per {modality}, in their order."
                )
            for r in range(row, row + repeats):
                start = 0
                for i in range(first, image):
                    chosen.append(i)
                    sample.append(r)
                    offset.append(start)
                    start += lengths[i]
        device = is_visual.device
        order = (~is_visual).long().argsort(dim=1, stable=True)
        where = torch.arange(max(lengths), device=device)
        take = torch.tensor(offset, device=device)[:, None] + where
        picked = tuple(lengths[i] for i in chosen)
        valid = where < torch.tensor(picked, device=device)[:, None]
        rows = order[torch.tensor(sample, device=device)]
        column = rows.gather(1, take.clamp(max=order.shape[1] - 1)).masked_fill(~valid, -1)
        visual = cls(
            column,
            picked,
            tuple(sample),
            tuple((n,) for n in picked),
            layout.to(device).groups(chosen),
            TokenMap.identity(picked, device),
        )
        return visual, chosen

    @classmethod
    def join(cls, parts: Sequence["Visual"], order: Sequence[int]) -> "Visual":
        """The groups of all `parts` as one; `order` are their numbers, counted over the parts, in prompt order."""
        device = parts[0].column.device
        members = [(part, g) for part in parts for g in range(len(part.sample))]
        members = [members[i] for i in order]
        where = torch.tensor(list(order), device=device)
        lengths = tuple(part.lengths[g] for part, g in members)
        inputs = max(sum(part.origin[g]) for part, g in members)
        maps = [_concatenate(part.token_map, [g], [sum(part.origin[g])], inputs) for part, g in members]

        def joined(columns: list[Tensor]) -> Tensor:
            return _pad(columns, -1)[where]

        row, col, segment = (
            joined([getattr(part.layout, name) for part in parts]) for name in ("row", "col", "segment")
        )
        return cls(
            joined([part.column for part in parts]),
            lengths,
            tuple(part.sample[g] for part, g in members),
            tuple(part.origin[g] for part, g in members),
            Layout(row, col, segment, tuple(part.layout.grids[g] for part, g in members)),
            _stack(maps, lengths, inputs),
        )

    def follow(self, token_map: TokenMap) -> "Visual":
        """What is left after `token_map`."""
        width = max(token_map.lengths)
        anchor = token_map.anchor[:, :width]
        return replace(
            self,
            column=follow(self.column, anchor),
            lengths=token_map.lengths,
            layout=self.layout.take(anchor),
            token_map=self.token_map.then(token_map),
        )

    def pooled(self) -> "Visual":
        """All groups of a sample as one group, in prompt order."""
        rows = sorted(set(self.sample))
        if len(rows) == len(self.sample):
            return self
        members = [[g for g, s in enumerate(self.sample) if s == row] for row in rows]
        lengths = tuple(sum(self.lengths[g] for g in group) for group in members)
        width, inputs = max(lengths), [sum(sum(self.origin[g]) for g in group) for group in members]
        device = self.column.device
        source = torch.full((len(rows), width), -1, device=device)
        maps = []
        for i, group in enumerate(members):
            start = 0
            for g in group:
                n = self.lengths[g]
                source[i, start : start + n] = torch.arange(n, device=device) + g * self.column.shape[1]
                start += n
            maps.append(_concatenate(self.token_map, group, [sum(self.origin[g]) for g in group], max(inputs)))
        missing = source < 0

        def pool(x: Tensor, fill: int) -> Tensor:
            return x.flatten()[source.clamp(min=0)].masked_fill(missing, fill)

        layout = self.layout
        first_segment = _first_segments(layout, members, device)
        shifted = replace(layout, segment=shift(layout.segment, first_segment[:, None]))
        grids = tuple(tuple(grid for g in group for grid in layout.grids[g]) for group in members)
        return Visual(
            pool(self.column, -1),
            lengths,
            tuple(rows),
            tuple(tuple(n for g in group for n in self.origin[g]) for group in members),
            replace(shifted.map(lambda part: pool(part, -1)), grids=grids),
            _stack(maps, lengths, max(inputs)),
        )

    def tokens(
        self,
        x: Float[Tensor, "B R D"],
        budget: Budget,
        signals: Mapping[str, Tensor],
        row_of: Int[Tensor, "B S"] | None = None,
        schedule: Schedule | None = None,
    ) -> Tokens:
        """What a stage sees of `x`."""
        wanted = budgets(budget, self.origin, self.lengths, self.layout, self.sample, schedule)
        return Tokens(self.gather(x, row_of), self.lengths, self.layout, signals, budget=wanted)

    def decide(
        self, step: Step, tokens: Tokens, x: Float[Tensor, "B R D"], row_of: Int[Tensor, "B S"] | None = None
    ) -> "tuple[Visual, Float[Tensor, 'B R D']]":
        """What is left after `step` decided on `tokens`, which are these inside `x`, and `x` with what was merged."""
        token_map = run_step(step, tokens)
        after = self.follow(token_map)
        if not token_map.is_selection:
            values = token_map.apply(tokens.x)[:, : after.column.shape[1]].to(x.dtype)
            x = after.scatter(x, values, row_of)
        return after, x

    def gather(self, x: Float[Tensor, "B R *D"], row_of: Int[Tensor, "B S"] | None = None) -> Float[Tensor, "G N *D"]:
        """The features of the surviving tokens; `row_of` translates columns to rows of a shortened `x`."""
        return x[self.sample_index[:, None], self.rows(row_of).clamp(min=0)]

    def scatter(
        self, x: Float[Tensor, "B R D"], values: Float[Tensor, "G N D"], row_of: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B R D"]:
        """`x` with the features of the surviving tokens replaced by `values` (a new tensor)."""
        rows = self.rows(row_of)
        extra = torch.where(rows < 0, x.shape[1], rows)  # padding lands in an extra row
        padded = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1)
        return padded.index_put((self.sample_index[:, None], extra), values)[:, :-1]

    def rows(self, row_of: Int[Tensor, "B S"] | None) -> Int[Tensor, "G N"]:
        """Row of each surviving token in the current hidden states, -1 in padding."""
        if row_of is None:
            return self.column
        return row_of[self.sample_index[:, None], self.column.clamp(min=0)].masked_fill(self.column < 0, -1)

    @property
    def sizes(self) -> Float[Tensor, "G N"]:
        """How many input tokens each surviving token stands for."""
        return self.token_map.sizes()[:, : self.column.shape[1]]

    @property
    def sample_index(self) -> Int[Tensor, " G"]:
        return torch.tensor(self.sample, device=self.column.device)

    def is_kept(self, batch: int, length: int) -> Bool[Tensor, "B S"]:
        """True at the columns of surviving tokens."""
        kept = torch.zeros(batch, length + 1, dtype=torch.bool, device=self.column.device)
        target = torch.where(self.column < 0, length, self.column)
        return kept.index_put((self.sample_index[:, None], target), torch.ones_like(target, dtype=torch.bool))[:, :-1]

    def per_sample(self, batch: int, lengths: Sequence[int] | None = None) -> list[int]:
        """Surviving (or `lengths`) tokens of each batch row."""
        counts = [0] * batch
        for row, n in zip(self.sample, self.lengths if lengths is None else lengths, strict=True):
            counts[row] += n
        return counts


def _mismatch(placeholders: int, features: int, images: int, modality: str) -> InputError:
    return InputError(
        f"the prompts hold {placeholders} {modality} placeholders, the {images} {modality}s give {features} tokens. "
        f"Let the processor make the prompt, with one {modality} token for each {modality}."
    )


def _first_segments(layout: Layout, members: list[list[int]], device: torch.device) -> Tensor:
    first = [0] * len(layout.grids)
    for group in members:
        start = 0
        for g in group:
            first[g] = start
            start += len(layout.grids[g])
    return torch.tensor(first, device=device)


def _concatenate(maps: TokenMap, group: Sequence[int], inputs: Sequence[int], num_tokens: int) -> TokenMap:
    """The maps of several groups side by side: one group whose input is all their inputs in a row."""
    parts: list[tuple[Tensor, ...]] = []
    token = slot = 0
    for g, n_in in zip(group, inputs, strict=True):
        one = maps.groups([g])
        n = one.lengths[0]
        anchor = one.anchor[:, :n]
        source, place, weight, mass = _edges(one)
        parts.append((anchor + token, source + token, shift(place, slot), weight, mass))
        token, slot = token + n_in, slot + n
    anchor, *rest = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return TokenMap(anchor, (slot,), num_tokens, *(() if maps.is_selection else rest))


def _edges(one: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source, slot, weight and mass of each edge of a map of one group; a selection copies its anchors."""
    if one.source is not None and one.slot is not None and one.weight is not None:
        return one.source, one.slot, one.weight, one.masses()
    anchor = one.anchor[:, : one.lengths[0]]
    index = torch.arange(anchor.shape[1], device=anchor.device)[None]
    ones = torch.ones_like(index).float()
    return anchor, index, ones, ones


def _pad(parts: Sequence[Tensor], value: int) -> Tensor:
    """All rows of `parts` below each other, filled up to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts])


def _stack(maps: list[TokenMap], lengths: tuple[int, ...], num_tokens: int) -> TokenMap:
    """Maps of one group each as a batch."""
    anchor = _pad([m.anchor for m in maps], -1)
    if all(m.is_selection for m in maps):
        return TokenMap(anchor, lengths, num_tokens)
    edges = zip(*(_edges(m) for m in maps), strict=True)
    return TokenMap(
        anchor, lengths, num_tokens, *(_pad(part, fill) for part, fill in zip(edges, (0, -1, 0, 0), strict=True))
    )
