"""A picture of a token map: which patches stayed, which were merged into which, which are gone."""

import colorsys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vtc.adapter import Picture, adapter_for
from vtc.report import Report

#: pixels of each of the two panels, and of the caption under them
PANEL = 576
CAPTION = 56
GAP = 12
BACKGROUND = (24, 26, 31)
KEPT = (80, 220, 120)


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


def seen_image(pixel_values: Tensor, image_processor: Any) -> Image.Image:
    """What the model saw: [3, H, W] normalised pixels -> an RGB image."""
    mean, std = (torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def overlay(image: Image.Image, report: Report, group: int = 0) -> Image.Image:
    """The image, and beside it the same image with the fate of each patch.

    Patches that stayed keep their brightness; patches that were merged are tinted with the colour of their token, whose
    place is outlined in that colour; dropped patches are dark.
    """
    token_map, layout = report.token_map, report.layout
    index = _image_of(report, group)
    height, width = layout.grids[index][0]
    sources = token_map.sources()[group].cpu()
    sizes = token_map.sizes()[group].cpu()
    anchors = {int(a) for a in token_map.anchor[group].cpu() if a >= 0}
    rows, columns = layout.row[index].cpu(), layout.col[index].cpu()
    left = image.resize((PANEL, PANEL), Image.Resampling.NEAREST if image.width < PANEL else Image.Resampling.LANCZOS)
    right = left.copy()
    draw = ImageDraw.Draw(right, "RGBA")
    colours = _colours(token_map.anchor.shape[1])
    for token in range(min(len(rows), len(sources))):
        if rows[token] < 0:
            continue
        box = _box(int(rows[token]), int(columns[token]), height, width)
        slot = int(sources[token])
        merged = slot >= 0 and sizes[slot] > 1.5
        if slot < 0:
            draw.rectangle(box, fill=(10, 10, 14, 205))
        elif merged:
            draw.rectangle(box, fill=(*colours[slot], 110))
        if token in anchors:
            outline = colours[slot] if merged else KEPT
            draw.rectangle(box, outline=(*outline, 255), width=2)
    return _side_by_side(left, right, _caption(report, group, sizes))


def _image_of(report: Report, group: int) -> int:
    """The layout's entry for a group of the map; beams repeat images, so groups may be more than images."""
    return min(group, len(report.layout.grids) - 1)


def _box(row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
    top, bottom = row * PANEL // height, (row + 1) * PANEL // height - 1
    return column * PANEL // width, top, (column + 1) * PANEL // width - 1, bottom


def _colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ for neighbouring slots (steps of the golden angle)."""
    values = [colorsys.hsv_to_rgb(i * 0.381966 % 1.0, 0.75, 1.0) for i in range(count)]
    return [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in values]


def _caption(report: Report, group: int, sizes: Tensor) -> str:
    row = report.samples[group]
    merged = int((sizes > 1.5).sum())
    text = f"{report.spec}: {report.visual_tokens[row]} tokens -> {report.entering[row]} enter the LLM"
    if report.after_last_cut[row] != report.entering[row]:
        text += f" -> {report.after_last_cut[row]} in its last layer"
    return text + (f", {merged} of them merged from several" if merged else "")


def _side_by_side(left: Image.Image, right: Image.Image, caption: str) -> Image.Image:
    canvas = Image.new("RGB", (2 * PANEL + 3 * GAP, PANEL + CAPTION + GAP), BACKGROUND)
    canvas.paste(left, (GAP, GAP))
    canvas.paste(right, (PANEL + 2 * GAP, GAP))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=17)
    draw.text((GAP, PANEL + GAP + 8), caption, fill=(235, 235, 235), font=font)
    legend = "green: kept as it is    coloured: merged into the outlined patch    dark: dropped"
    draw.text((GAP, PANEL + GAP + 30), legend, fill=(160, 165, 175), font=ImageFont.load_default(size=14))
    return canvas


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
