"""HiRED: split the budget of an image over its tiles by [CLS] attention, then keep the best tokens of each tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.catalogue.registry import register
from vtc.errors import InputError
from vtc.options import Share, Variant
from vtc.primitives import keep_where, of_full, per_image, ranks, seats, settled
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class HiRED(Method):
    """The full image gets a share alpha of the budget, its tiles get the rest by the early [CLS] attention.

    "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models" (arXiv
    2408.10945). A group is a tile; the budget of an image is the sum over its tiles. A tile's share is what its region
    of the full image gets from [CLS] in the first block; inside a tile the tokens with the highest [CLS] attention of
    the feature layer stay. Order is raster order in each tile. An image without tiles spends its whole budget on the
    one grid it has.

    The default ("paper") sums attention values over the region of the full image that a tile covers, and hands out
    seats by highest averages (Sainte-Lague, ours), so that the budget of an image is met exactly. The published code
    ("reference") counts the top int(N (1 - alpha)) tokens instead of summing, cuts the flat full image into
    contiguous chunks (horizontal bands, not the tiles' regions), and loses remainders and what exceeds a tile: fewer
    tokens stay than the budget says. What it does after the selection, laying tiles out with height and width of
    their grid swapped and removing kept tokens as if they were padding, belongs to the packing of the model and is
    not repeated.

    Args:
        alpha: share of the budget that the full image gets.
        variant: "paper" or "reference".
    """

    slug = "hired"
    paper = Paper(
        "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
        "2408.10945",
        "AAAI 2025",
    )
    steps = ("budget of each tile by early [CLS] attention, then top-k [CLS] attention", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-NeXT-7B, 20 % of the tokens of full image and tiles enter the LLM: TextVQA 61.4 (full 64.8), VQAv2 "
        "77.5 (80.3); tables 3 and 4 of the paper"
    )
    positions = "compact"
    defaults = {"llava": 0.2, "llava_next": 0.2}  # token_budget_rate of the published scripts

    alpha: Share = 0.5
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        signals = tuple(Signal(name) for name in ("cls_attention", "cls_attention_layers", "tile"))
        return (Stage(Site("tower_out"), self.filter, None, settled(), signals),)

    def filter(self, tokens: Tokens) -> Tensor:
        mask, score = tokens.mask, tokens.signal("cls_attention").float()
        image, number = tokens.signal("tile")[:, 0], tokens.signal("tile")[:, 1]
        is_full = number == 0
        total, tiles = per_image(tokens.budget, image), per_image([1] * len(image), image)
        area = torch.tensor(tokens.lengths, device=image.device)
        own = torch.where(tiles == 1, total, (total.double() * self.alpha).long())
        own = torch.minimum(own, of_full(area, image, is_full))
        place = ranks(score, mask)
        if self.variant == "reference":
            quota = (self._chunk_share(tokens) * torch.minimum(total - own, (tiles - 1) * area)).long()
            is_next = ~is_full[:, None] & (place < quota[:, None])
            is_first = is_full[:, None] & (place < own[:, None])
            return keep_where(mask & (is_first | is_next), mask.shape[1])
        kept = seats(self._region_share(tokens), place, total, image, full=is_full, own=own, mask=mask)
        return keep_where(kept, mask.shape[1])

    def _region_share(self, tokens: Tokens) -> Tensor:
        """For each tile its region's share in the early [CLS] attention of the full image, [B]."""
        shape, row, column = self._grid(tokens)
        image, number, height, width = tokens.signal("tile").unbind(dim=1)
        # the tile over the middle of the token
        row, column = ((2 * place + 1) for place in (row, column))
        row = row * height[:, None] // (2 * shape[:, :1])
        column = column * width[:, None] // (2 * shape[:, 1:])
        low = tokens.signal("cls_attention_layers")[:, 0].double()
        return self._share(low * tokens.mask, 1 + row * width[:, None] + column, image, number)

    def _chunk_share(self, tokens: Tokens) -> Tensor:
        """The same by the published code: counts of top tokens in contiguous chunks of the full image."""
        shape, row, column = self._grid(tokens)
        image, number = tokens.signal("tile")[:, 0], tokens.signal("tile")[:, 1]
        area = shape[:, 0] * shape[:, 1]
        tiles = per_image([1] * len(image), image) - 1
        low = tokens.signal("cls_attention_layers")[:, 0].float()
        top = (area.double() * (1 - self.alpha)).long()
        is_top = tokens.mask & (ranks(low, tokens.mask) < top[:, None])
        chunk = 1 + (row * shape[:, 1:] + column) // (area // tiles.clamp(min=1)).clamp(min=1)[:, None]
        return self._share((is_top & (chunk <= tiles[:, None])).double(), chunk, image, number)

    def _share(self, value: Tensor, region: Tensor, image: Tensor, number: Tensor) -> Tensor:
        """For each tile the share of its number among the `region` of the full image's tokens, weighted by `value`."""
        value, region = (of_full(part, image, number == 0) for part in (value, region))
        return (value * (region == number[:, None])).sum(dim=1) / value.sum(dim=1).clamp(min=1e-30)

    def _grid(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(height, width) of each tile in tokens, [B, 2], and row and column of each token."""
        if tokens.layout is None:
            raise InputError("method 'hired' shares a budget by regions of a grid, and these tokens have no layout.")
        shape = torch.tensor([grids[0] for grids in tokens.layout.grids], device=tokens.x.device)
        return shape, tokens.layout.row, tokens.layout.col
