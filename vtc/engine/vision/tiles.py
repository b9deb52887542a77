"""What the stages at `tower_out` see of one encoder call, and how their maps become maps of whole images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vtc.adapter import Packing
from vtc.engine.decide import budgets
from vtc.indices import follow, take
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of tokens that reach the LLM.

    Args:
        x: [G, M, D] features, valid ones first.
        lengths: valid tokens of each group.
        layout: where they lie, where the host has a grid.
        rows: which group of the host each one is (groups without a token that reaches the LLM are left out).
        index: int64 [G, M], place of each token in the host's group, -1 in padding; None: all, in order.
        image: the image of each group.
        tiles: (height, width) of each image in tiles, or None; see `Packing`.
    """

    x: Float[Tensor, "G M D"]
    lengths: tuple[int, ...]
    layout: Layout | None
    rows: list[int]
    index: Int[Tensor, "G M"] | None
    image: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(
        cls, packing: Packing | None, x: Tensor, layout: Layout | None, lengths: tuple[int, ...] | None = None
    ) -> "Groups":
        """The groups of `x` [G, N, D]; without a packing each is an image, and `layout` and `lengths` are its own."""
        if packing is None:
            lengths = lengths or (x.shape[1],) * x.shape[0]
            return cls(x, lengths, layout, list(range(x.shape[0])), None, tuple(range(x.shape[0])))
        slot = packing.slot.cpu()
        counts = (slot >= 0).sum(1).tolist()
        rows = [g for g, n in enumerate(counts) if n]
        lengths = tuple(counts[g] for g in rows)
        index = (slot < 0).long().argsort(dim=1, stable=True)[rows, : max(lengths)]
        index = index.masked_fill(torch.arange(index.shape[1]) >= torch.tensor(lengths)[:, None], -1)
        image = tuple(packing.image[g] for g in rows)
        places = follow(slot[rows], index)
        index = index.to(x.device)
        return cls(
            take(x[rows], index),
            lengths,
            _group_layout(packing.layout, image, places).to(x.device),
            rows,
            index,
            image,
            packing.tiles,
        )

    def tile(self) -> Int[Tensor, "G 4"]:
        """Image, number in it and its (height, width) in tiles for each group; an image of its own where not tiled."""
        if self.tiles is None:
            lines = [(g, 0, 0, 0) for g in range(len(self.rows))]
        else:
            first = {image: row for row, image in reversed(list(zip(self.rows, self.image, strict=True)))}
            lines = [
                (image, row - first[image], *self.tiles[image])
                for row, image in zip(self.rows, self.image, strict=True)
            ]
        return torch.tensor(lines, device=self.x.device)

    def take(self, value: Tensor) -> Tensor:
        """A signal [G', N], [G', L, N] or [G', H, N, d] of the host's groups for the tokens of these."""
        return value if self.index is None else take_signal(value[self.rows], self.index)

    def place(self, anchor: Int[Tensor, "G K"]) -> Int[Tensor, "G K"]:
        """Places in the host's groups of the tokens `anchor`; -1 stays -1."""
        return anchor if self.index is None else follow(self.index, anchor)

    def budgets(self, budget: Budget, lengths: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
        """Tokens that stay in each group; a number per image or video is shared by its groups, at least 1 for each."""
        if budget.per not in ("image", "video") or len(set(self.image)) == len(self.image):
            return budgets(budget, tuple((n,) for n in self.lengths), lengths, layout)
        wanted = [0] * len(self.lengths)
        for image in set(self.image):
            members = [g for g, i in enumerate(self.image) if i == image]
            full = sum(self.lengths[g] for g in members)
            (total,) = budget.resolve((full,))
            # one token each, and the rest by length
            rest, free = max(0, total - len(members)), max(1, full - len(members))
            share = [rest * (self.lengths[g] - 1) // free for g in members]
            for rank, g in enumerate(members):
                wanted[g] = 1 + share[rank] + (rank < rest - sum(share))
        return tuple(max(1, min(want, have)) for want, have in zip(wanted, lengths, strict=True))

    def to_images(self, token_map: TokenMap, packing: Packing) -> TokenMap:
        """The map of each image's slots in the LLM: what groups keep, and the separators that stay with it.

        How many separators stay depends on the decision, so this asks the device for one count per image.
        """
        assert self.index is not None
        device = token_map.anchor.device
        width, images = max(packing.lengths), len(packing.lengths)
        image = torch.tensor(self.image, device=device)[:, None]
        slot = follow(packing.slot.to(device)[self.rows], self.index)
        anchor = follow(slot, token_map.anchor)

        def marked(*slots: Tensor) -> Tensor:
            marks = torch.zeros(images, width + 1, dtype=torch.bool, device=device)
            for places in slots:
                marks[image, torch.where(places < 0, width, places)] = True
            return marks[:, :-1]

        is_token, named, stays = marked(slot), marked(slot), marked(anchor)
        if packing.separator is not None:
            separator = follow(packing.separator.to(device)[self.rows], self.index)
            named, stays = marked(slot, separator), marked(anchor, follow(separator, token_map.anchor))
        inside = torch.arange(width, device=device) < torch.tensor(packing.lengths, device=device)[:, None]
        stays = stays | (inside & ~named)
        counts = stays.sum(1).tolist()
        anchors = (~stays).long().argsort(dim=1, stable=True)[:, : max(counts)]
        last = torch.tensor(counts, device=device)[:, None]
        anchors = anchors.masked_fill(torch.arange(anchors.shape[1], device=device) >= last, -1)
        if token_map.source is None or token_map.slot is None or token_map.weight is None:
            return TokenMap.select(anchors, width, counts)
        rank = stays.long().cumsum(1) - 1
        target = follow(anchor, token_map.slot)
        target = rank[image, target.clamp(min=0)].masked_fill(target < 0, -1)
        places = torch.arange(width, device=device)
        own = torch.where(stays & ~is_token, rank, -1)  # separators are their own source

        def edges(values: Tensor, own: Tensor, fill: int) -> Tensor:
            members = [[g for g, i in enumerate(self.image) if i == image] for image in range(images)]
            lines = [torch.cat([*values[group], own[i]]) for i, group in enumerate(members)]
            return nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=fill)

        ones = torch.ones(images, width, device=device, dtype=token_map.weight.dtype)
        mass = token_map.mass
        return TokenMap(
            anchors,
            tuple(counts),
            width,
            edges(follow(slot, token_map.source).clamp(min=0), places.expand(images, -1), 0),
            edges(target, own, -1),
            edges(token_map.weight, ones, 0),
            None if mass is None else edges(mass, ones.to(mass.dtype), 0),
        )


def take_signal(value: Tensor, index: Int[Tensor, "G M"]) -> Tensor:
    """Tokens `index` of a signal [G, N], [G, L, N] or [G, H, N, d]; -1 reads token 0."""
    return take(value, index, min(2, value.dim() - 1))


def _group_layout(layout: Layout, image: Sequence[int], places: Int[Tensor, "G M"]) -> Layout:
    """The layout of groups whose tokens are the slots `places` of `image`; a group inside one segment counts as one."""
    layout = layout.groups(image).to(places.device).take(places)
    last = layout.segment.amax(dim=1, keepdim=True)
    has_place = layout.segment >= 0
    alone = ((layout.segment == last) | ~has_place).all(dim=1)
    segment = torch.where(alone[:, None] & has_place, 0, layout.segment)
    grids = tuple(
        (whole[int(number)],) if one else whole
        for whole, one, number in zip(layout.grids, alone.tolist(), last[:, 0].tolist(), strict=True)
    )
    return Layout(layout.row, layout.col, segment, grids)
