"""A picture of a report: which patches stayed, which were merged into which, which are gone.

Tiles lie as they lie on their image, with the whole image beside them; frames of a video lie in rows; an image of its
own resolution keeps its shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from vtc.adapter import Picture, adapter_for
from vtc.errors import InputError
from vtc.report import Report
from vtc.tokenmap import TokenMap

#: pixels of the longer side of a panel; it grows until a token has MIN_CELL, but not beyond MAX_PANEL
PANEL, MAX_PANEL, MIN_CELL = 576, 2304, 6
#: pixels between segments, between panels, and of the lines under them
SEAM, GAP, CAPTION = 4, 12, 56
BACKGROUND = (24, 26, 31)
KEPT = (255, 255, 255)
DROPPED = (10, 10, 14, 205)
#: opacity of the colour of merged tokens
TINT = 130
#: the colours of Okabe and Ito, which colour-blind people tell apart; black and white mean something else here
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
LEGEND = "white frame: kept as it is    coloured: merged into the framed patch of that colour    dark: dropped"

#: left, top, right and bottom pixel, the last two included
Box = tuple[int, int, int, int]
Grid = tuple[int, int]


def pictures(model: nn.Module, inputs: Mapping[str, Any], processor: Any = None) -> tuple[Picture, ...]:
    """The images, then the videos, that `model` sees when it is called with `inputs`, in colours from 0 to 1.

    Args:
        processor: what made the inputs; its mean and standard deviation give the colours back. Without them the darkest
            value of each picture becomes 0 and the brightest 1.

    Raises:
        InputError: pixels of a form that the family does not have.
        UnsupportedModelError: no adapter, or one that does not say how pixels lie.
    """
    return tuple(_coloured(picture, processor) for picture in adapter_for(model).pictures(inputs))


def draw(report: Report, pictures: Sequence[Picture], sample: int = 0, image: int | None = None) -> Image.Image:
    """The images and videos of a prompt, and beside each the same with the fate of every patch.

    Patches that stayed keep their brightness; patches that were merged have the colour of their token, whose place is
    framed in that colour; dropped patches are dark. What the host cuts off as padding of tiles is left out.

    Args:
        pictures: what `pictures` makes of the inputs of the reported prefill.
        sample: which prompt of the batch.
        image: which of its images and videos, counted from 0; None: all.

    Raises:
        InputError: there is no such prompt or image, or the pictures are not those of the report.
    """
    places = _places(report, pictures)
    groups = [g for g, medium in enumerate(report.media) if medium.sample == sample]
    chosen = list(dict.fromkeys(number for g in groups for number, _ in places[g]))
    if image is not None:
        chosen = chosen[image : image + 1] if image >= 0 else []
    if not chosen:
        have = sorted({medium.sample for medium in report.media})
        what = "image" if image is None else f"image {image}"
        raise InputError(f"sample {sample} of this report has no {what}; the samples {have} have images.")
    fates: dict[int, _Fates] = {}
    for g in (g for g, row in enumerate(report.samples) if row == sample):
        fates[g] = _Fates.of(report.token_map, g, first=sum(len(one.colours) for one in fates.values()))
    panels = []
    for number in chosen:
        members = [g for g in groups if places[g][0][0] == number]
        left, boxes = _sheet(pictures[number], [grid for g in members for grid in report.layout.grids[g]])
        right = left.copy()
        for g in members:
            _paint(right, [boxes[segment] for _, segment in places[g]], report, g, fates)
        panels.append((left, right))
    return _page(panels, _caption(report, sample, sum(len(one.colours) for one in fates.values())))


def arrange(picture: Picture, grids: Sequence[Grid]) -> tuple[tuple[int, int], tuple[Box, ...]]:
    """Width and height of a panel of `picture`, and where each segment lies on it.

    Args:
        grids: rows and columns of tokens of each segment.
    """
    sizes = [(segment.shape[-2], segment.shape[-1]) for segment in picture.segments]
    whole = picture.overview
    rest = [i for i in range(len(sizes)) if i != whole]
    height, width = sizes[rest[0]]
    columns = _columns(len(rest), height, width) if picture.tiles is None else picture.tiles[1]
    rows = -(-len(rest) // columns)
    beside = (0, 0) if whole is None else sizes[whole]
    side = max(beside[1] + columns * width, beside[0], rows * height)
    cell = min(min(h / grid[0], w / grid[1]) for (h, w), grid in zip(sizes, grids, strict=True))
    scale = min(max(PANEL / side, MIN_CELL / cell), MAX_PANEL / side)

    def box(left: int, top: int, size: Grid) -> Box:
        return left, top, left + round(size[1] * scale) - 1, top + round(size[0] * scale) - 1

    start = 0 if whole is None else round(beside[1] * scale) + 2 * SEAM
    across, down = round(width * scale) + SEAM, round(height * scale) + SEAM
    boxes = {i: box(start + k % columns * across, k // columns * down, sizes[i]) for k, i in enumerate(rest)}
    if whole is not None:
        boxes[whole] = box(0, 0, beside)
    right, bottom = (1 + max(corner[axis] for corner in boxes.values()) for axis in (2, 3))
    return (right, bottom), tuple(boxes[i] for i in range(len(sizes)))


def cell(box: Box, grid: Grid, row: int, column: int) -> Box:
    """Where the token at (`row`, `column`) of a segment lies, whose box and grid these are."""
    left, top, right, bottom = box
    (rows, columns), width, height = grid, right + 1 - left, bottom + 1 - top
    return (
        left + column * width // columns,
        top + row * height // rows,
        left + (column + 1) * width // columns - 1,
        top + (row + 1) * height // rows - 1,
    )


@dataclass(frozen=True, eq=False)
class _Fates:
    """What became of the tokens of one group of a map.

    Args:
        slot: for each token the slot that it mainly went into, -1: dropped.
        place: for each token the slot that took its place, -1: none.
        colours: those of the slots that several tokens went into.
    """

    slot: list[int]
    place: list[int]
    colours: dict[int, tuple[int, int, int]]

    @classmethod
    def of(cls, token_map: TokenMap, group: int, first: int) -> "_Fates":
        """Those of `group`, in colours from the one numbered `first` on."""
        one = token_map.groups([group])
        slot = one.sources()[0].cpu()
        anchor = one.anchor[0, : one.lengths[0]].tolist()
        place = [-1] * one.num_tokens
        for number, token in enumerate(anchor):
            place[token] = number
        merged = (slot[slot >= 0].bincount(minlength=len(anchor)) > 1).nonzero()[:, 0].tolist()
        return cls(slot.tolist(), place, {number: _colour(i) for i, number in enumerate(merged, first)})


def _colour(index: int) -> tuple[int, int, int]:
    """The colours one after the other, then lighter, then darker, and again."""
    colour, lap = COLOURS[index % len(COLOURS)], index // len(COLOURS) % 3
    red, green, blue = (value if not lap else (value + 255) // 2 if lap == 1 else value // 2 for value in colour)
    return red, green, blue


def _coloured(picture: Picture, processor: Any) -> Picture:
    part = getattr(processor, f"{picture.modality}_processor", None) or getattr(processor, "image_processor", processor)
    mean, std = (getattr(part, name, None) for name in ("image_mean", "image_std"))
    segments = [segment.detach().float().cpu() for segment in picture.segments]
    if mean is None or std is None:
        low = min(float(segment.min()) for segment in segments)
        high = max(float(segment.max()) for segment in segments)
        segments = [(segment - low) / max(high - low, 1e-6) for segment in segments]
    elif getattr(part, "do_normalize", True):
        back = [torch.tensor(values)[:, None, None] for values in (std, mean)]
        segments = [segment * back[0] + back[1] for segment in segments]
    return replace(picture, segments=tuple(segment.clamp(0, 1) for segment in segments))


def _places(report: Report, pictures: Sequence[Picture]) -> list[list[tuple[int, int]]]:
    """For each group of the layout the picture and the segment of it in which each of its segments lies."""
    counts = {medium[:2]: len(grids) for medium, grids in zip(report.media, report.layout.grids, strict=True)}
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for modality in ("image", "video"):
        segments = [
            (number, segment)
            for number, picture in enumerate(pictures)
            if picture.modality == modality
            for segment in range(len(picture.segments))
        ]
        keys = sorted(key for key in counts if key[0] == modality)
        expected = sum(counts[key] for key in keys)
        if len(segments) != expected:
            raise InputError(
                f"the report is about {expected} tiles or frames of {modality}s, and the pictures have "
                f"{len(segments)}. Make them from the inputs of the reported prefill."
            )
        for key in keys:
            found[key], segments = segments[: counts[key]], segments[counts[key] :]
    return [found[medium[:2]] for medium in report.media]


def _columns(count: int, height: int, width: int) -> int:
    """Columns of a contact sheet whose longer side is shortest."""
    return min(range(1, count + 1), key=lambda columns: max(columns * width, -(-count // columns) * height))


def _sheet(picture: Picture, grids: Sequence[Grid]) -> tuple[Image.Image, tuple[Box, ...]]:
    size, boxes = arrange(picture, grids)
    sheet = Image.new("RGB", size, BACKGROUND)
    for segment, (left, top, right, bottom) in zip(picture.segments, boxes, strict=True):
        pixels = (segment.expand(3, -1, -1).permute(1, 2, 0) * 255).round().byte()
        width = right + 1 - left
        filter = Image.Resampling.NEAREST if pixels.shape[1] <= width else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(pixels.numpy()).resize((width, bottom + 1 - top), filter), (left, top))
    return sheet, boxes


def _paint(sheet: Image.Image, boxes: Sequence[Box], report: Report, group: int, fates: Mapping[int, _Fates]) -> None:
    """Paint what became of the tokens of one group of the layout, whose segments lie in `boxes`."""
    medium, layout = report.media[group], report.layout
    fate, first = fates.get(group), 0
    if len(report.samples) < len(report.media):  # the map's group is the whole sample
        fate = fates[report.samples.index(medium.sample)]
        first = sum(other.tokens for other in report.media[:group] if other.sample == medium.sample)
    assert fate is not None
    draw = ImageDraw.Draw(sheet, "RGBA")
    places = torch.stack([layout.segment[group], layout.row[group], layout.col[group]])[:, : medium.tokens].T.tolist()
    grids = layout.grids[group]
    seen = {tuple(place) for place in places}
    for segment, (rows, columns) in enumerate(grids):
        for row, column in ((row, column) for row in range(rows) for column in range(columns)):
            if (segment, row, column) not in seen:
                draw.rectangle(cell(boxes[segment], grids[segment], row, column), fill=BACKGROUND)
    for token, (segment, row, column) in enumerate(places, first):
        if row < 0:
            continue
        box = cell(boxes[segment], grids[segment], row, column)
        slot, taken = fate.slot[token], fate.place[token]
        if slot < 0:
            draw.rectangle(box, fill=DROPPED)
        elif slot in fate.colours:
            draw.rectangle(box, fill=(*fate.colours[slot], TINT))
        if taken >= 0:
            width = 2 if box[2] - box[0] > 8 else 1
            draw.rectangle(box, outline=fate.colours.get(taken, KEPT), width=width)
            if taken in fate.colours and width > 1:  # a dark line parts the frame from tokens of its colour
                left, top, right, bottom = box
                draw.rectangle((left + width, top + width, right - width, bottom - width), outline=BACKGROUND)


def _caption(report: Report, sample: int, merged: int) -> str:
    text = f"{report.spec}: {report.visual_tokens[sample]} tokens -> {report.entering[sample]} enter the LLM"
    if report.after_last_cut[sample] != report.entering[sample]:
        text += f" -> {report.after_last_cut[sample]} in its last layer"
    return text + (f", {merged} of them merged from several" if merged else "")


def _page(panels: Sequence[tuple[Image.Image, Image.Image]], caption: str) -> Image.Image:
    """Pairs of panels below each other, and what they show."""
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    wide = max(left.width for left, _ in panels)
    width = max(2 * wide + 3 * GAP, *(2 * GAP + round(f.getlength(t)) for f, t in ((font, caption), (small, LEGEND))))
    height = sum(left.height + GAP for left, _ in panels) + CAPTION + GAP
    page = Image.new("RGB", (width, height), BACKGROUND)
    top = GAP
    for left, right in panels:
        page.paste(left, (GAP, top))
        page.paste(right, (wide + 2 * GAP, top))
        top += left.height + GAP
    draw = ImageDraw.Draw(page)
    draw.text((GAP, top - 4), caption, fill=(235, 235, 235), font=font)
    draw.text((GAP, top + 18), LEGEND, fill=(160, 165, 175), font=small)
    return page
