"""GlobalCom2: the full image decides how many tokens each of its tiles keeps, and helps to say which."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtc.catalogue.registry import register
from vtc.errors import InputError
from vtc.options import OneOf, Positive, Variant, Within
from vtc.primitives import keep_where, of_full, per_image, ranks, seats, settled
from vtc.stages import Method, Paper, Signal, Site, Stage
from vtc.tokens import Tokens


@register
@dataclass(frozen=True)
class GlobalCom2(Method):
    """Tiles get budgets by what their region of the full image (the thumbnail) scores, and tokens by both views.

    "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language
    Models" (arXiv 2501.05179). A group is a tile; the budget of an image is the sum over its tiles. The score is the
    logit of [CLS] for a token (before the softmax, mean over heads) in the tower's last block. The full image keeps its
    own budget by that score. With m_j the sum of its scores over the region of tile j and sigma = softmax(m / T), tile
    j gets the share R (1 + sigma_j - mean sigma) of its tokens. Inside a tile the score is the sum of two unit vectors
    over its tokens: its own scores, and those of the full image, resized to the tiles and without their padding.

    The default ("paper") hands out exactly the budget of the image, by highest averages (ours), and so meets it. The
    published code ("reference") rounds each tile down, caps it at all of its tokens, and handles one image at a time.
    Its output lists the tokens of the full image by score, and puts the kept tokens of padded tiles in wrong places;
    order and places belong to the packing of the model here, where newlines stay with the tokens of their row.

    An image without tiles has no thumbnail: its best tokens by the score stay.

    Args:
        temperature: T of the softmax over tiles.
        score: "cls", or "mean" for towers without [CLS], as notes on the paper give it for SigLIP: minus the cosine to
            the mean feature of the view.
        layer: block of the logits, counted from the feature layer; 1 is the last block of LLaVA's tower.
        ratio: R of the "reference" variant where the budget of a tile is no exact share of its tokens; 0: that share.
        variant: "paper" or "reference".
    """

    slug = "globalcom2"
    paper = Paper(
        "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language "
        "Models",
        "2501.05179",
        "AAAI 2026",
    )
    steps = ("budget of each tile by the thumbnail, then top-k of local and global score", "none", "drop")
    fidelity = "golden"
    headline = (
        "LLaVA-NeXT-7B, 25 % of 2880 tokens enter the LLM (the code adds newlines): 96.7 % of the full model's "
        "average; as copied in a summary of table 1 of the paper"
    )
    tags = frozenset({"needs_grid"})
    defaults = {"llava_next": 0.25}  # retention_ratio of the published code

    temperature: Positive = 10.0
    score: Annotated[str, OneOf("cls", "mean")] = "cls"
    layer: int = 1
    ratio: Annotated[float, Within("[0, 1]", "a share, or 0 for that of the budget,")] = 0.0
    variant: Variant = "paper"

    def stages(self) -> tuple[Stage, ...]:
        signals = (Signal("tile"), *((Signal("cls_logits", self.layer),) if self.score == "cls" else ()))
        return (Stage(Site("tower_out"), self.filter, None, settled(), signals),)

    def filter(self, tokens: Tokens) -> Tensor:
        tile, mask = tokens.signal("tile"), tokens.mask
        image, is_full = tile[:, 0], tile[:, 1] == 0
        local = self.local(tokens)
        scale = self.scales(tokens, local)
        score = torch.where(is_full[:, None], local, self.combined(tokens, local))
        place = ranks(score, mask)
        area, own = (torch.tensor(row, device=image.device) for row in (tokens.lengths, tokens.budget))
        if self.variant == "reference":
            base = self.ratio or tokens.budget[0] / tokens.lengths[0]
            quota = (area * (base * scale).clamp(max=1.0)).long()
            return keep_where(mask & (place < torch.where(is_full, own, quota)[:, None]), mask.shape[1])
        total = per_image(tokens.budget, image)
        kept = seats(area * scale, place, total, image, full=is_full, own=own, mask=mask)
        return keep_where(kept, mask.shape[1])

    def local(self, tokens: Tokens) -> Tensor:
        """Score of each token in its own view, [B, N]."""
        if self.score == "cls":
            return tokens.signal("cls_logits").float()
        x = tokens.x.float() * tokens.mask[..., None]
        return -cosine_similarity(x, x.sum(dim=1, keepdim=True), dim=-1)

    def scales(self, tokens: Tokens, local: Tensor) -> Tensor:
        """1 + sigma_j - mean sigma of each tile in float64, 1 for full images, [B]."""
        side, row, col = self._grid(tokens)
        image, number, height, width = tokens.signal("tile").unbind(dim=1)
        is_full = number == 0
        # places of the full image -> tiles; what is left over goes to the last row and column of tiles
        step_row, step_col = (
            (size // count.clamp(min=1)).clamp(min=1)
            for size, count in zip(side.unbind(1), (height, width), strict=True)
        )
        tile_row = torch.minimum(row // step_row[:, None], (height - 1).clamp(min=0)[:, None])
        tile_col = torch.minimum(col // step_col[:, None], (width - 1).clamp(min=0)[:, None])
        region = (1 + tile_row * width[:, None] + tile_col).masked_fill(~tokens.mask, -1)
        region, value = (of_full(part, image, is_full) for part in (region, local.double()))
        mass = (value * (region == number[:, None])).sum(dim=1)
        tiles = per_image((~is_full).long(), image)
        highest = torch.full((len(image),), -torch.inf, device=image.device, dtype=mass.dtype)
        highest = highest.scatter_reduce(0, image, mass.masked_fill(is_full, -torch.inf), "amax")[image]
        power = ((mass - highest) / self.temperature).exp().masked_fill(is_full, 0.0)
        sigma = power / (per_image(power, image) + 1e-8)
        mean = per_image(sigma, image) / tiles.clamp(min=1)
        return torch.where(is_full, 1.0, 1.0 + sigma - mean)

    def combined(self, tokens: Tokens, local: Tensor) -> Tensor:
        """Own and global score of each token, each a unit vector over its tile, [B, N]."""
        parts = [part * tokens.mask for part in (local, self._resized(tokens, local))]
        units = [part / torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp(min=1e-12) for part in parts]
        return units[0] + units[1]

    def _resized(self, tokens: Tokens, local: Tensor) -> Tensor:
        """Scores of the full image at the places of its tiles' tokens, bilinear over the part without padding."""
        side, row, col = self._grid(tokens)
        image, number, _, width = tokens.signal("tile").unbind(dim=1)
        is_full, index = number == 0, (number - 1).clamp(min=0)
        value, size = of_full(local, image, is_full), of_full(side, image, is_full)
        known = tokens.mask & ~is_full[:, None]
        corners = []
        for axis, (place, tile) in enumerate(((row, index // width.clamp(min=1)), (col, index % width.clamp(min=1)))):
            place = place + (tile * side[:, axis])[:, None]  # on the grid of all tiles
            first = _extreme(place, known, image, "amin")
            count = _extreme(place, known, image, "amax") - first + 1
            length = size[:, axis, None]
            at = ((place - first + 0.5) * (length / count) - 0.5).clamp(min=0)
            near = at.long().minimum(length - 1)
            corners.append((near, torch.minimum(near + 1, length - 1), at - near))
        (top, bottom, down), (left, right, across) = corners
        columns = size[:, 1:]

        def read(r: Tensor, c: Tensor) -> Tensor:
            return value.gather(1, (r * columns + c).clamp(min=0, max=value.shape[1] - 1))

        upper = torch.lerp(read(top, left), read(top, right), across.to(value.dtype))
        lower = torch.lerp(read(bottom, left), read(bottom, right), across.to(value.dtype))
        return torch.lerp(upper, lower, down.to(value.dtype))

    def _grid(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(height, width) of each tile in tokens, [B, 2], and row and column of each token."""
        if tokens.layout is None:
            raise InputError("method 'globalcom2' reads regions of a grid, and these tokens have no layout.")
        side = torch.tensor([grids[0] for grids in tokens.layout.grids], device=tokens.x.device)
        return side, tokens.layout.row, tokens.layout.col


def _extreme(place: Tensor, known: Tensor, image: Tensor, reduce: str) -> Tensor:
    """The least or greatest of the `known` places of each image, [B, 1]; 0 where there is none."""
    far = torch.iinfo(place.dtype).max if reduce == "amin" else torch.iinfo(place.dtype).min
    each = place.masked_fill(~known, far)
    each = each.amin(dim=1) if reduce == "amin" else each.amax(dim=1)
    out = torch.full((len(image),), far, dtype=place.dtype, device=place.device)
    out = out.scatter_reduce(0, image, each, reduce)
    return out.masked_fill(out == far, 0)[image][:, None]
