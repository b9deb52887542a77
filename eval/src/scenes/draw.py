"""Procedurally drawn scenes with templated questions, made from a seed.

A scene holds one to six objects that do not overlap: coloured shapes, at most one handwritten digit on a card and at
most one short word on a card, over a plain, a textured or a photographic background. Every question is answered by one
word and can be checked against `Scene.objects`. Pillow and NumPy draw shapes, words, plain and textured backgrounds;
handwritten digits come from scikit-learn's `load_digits` and photographs from the public-domain and CC0 pictures in
scikit-image's wheel. A seed draws the same scene again as long as the same of these two packages are installed.

Seeds are split by range: `scene_seed("train", i)`, `scene_seed("val", i)` and `scene_seed("test", i)` never meet, and
the handwritten digits of the three ranges are different samples.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vtc.extras import available, missing

CATEGORIES = ("colour", "shape", "count", "existence", "relation", "digit", "word", "background")
KINDS = ("shape", "digit", "word")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 165, 60),
    "blue": (45, 85, 220),
    "purple": (150, 55, 185),
}
SIZES = {"small": (14, 18), "large": (24, 32)}
WORDS = (
    "cat",
    "dog",
    "sun",
    "bus",
    "key",
    "map",
    "hat",
    "jam",
    "owl",
    "fox",
    "tree",
    "fish",
    "moon",
    "lamp",
    "rice",
    "wolf",
)
BACKGROUNDS = ("plain", "stripes", "checks", "dots", "photo")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
SPLITS = ("train", "val", "test")
MAX_OBJECTS = 6

_SPLIT_BITS = 40
_MARGIN = 3  # pixels between two objects, and between an object and the border
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; `outline` and `hole` are polygons in pixels, and `colour` is None for cards."""

    kind: Literal["shape", "digit", "word"]
    shape: str | None
    colour: str | None
    size: str
    text: str | None
    box: tuple[float, float, float, float]
    outline: tuple[tuple[float, float], ...]
    hole: tuple[tuple[float, float], ...] = ()

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, x first."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        """The noun that questions use: the shape, "digit" or "word"."""
        return self.shape or self.kind


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; objects are in reading order of the 8-pixel grid cell of their centre."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    background: str
    seed: int


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer, which is one of `choices`."""

    category: str
    prompt: str
    answer: str
    choices: tuple[str, ...]


def scene_seed(split: str, index: int) -> int:
    """The seed of scene `index` of a split; no two splits share a seed."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    if not 0 <= index < 1 << _SPLIT_BITS:
        raise ValueError(f"index={index}: a split holds the scenes 0 to 2**{_SPLIT_BITS} - 1.")
    return (SPLITS.index(split) << _SPLIT_BITS) + index


def draw_scene(
    seed: int,
    *,
    size: int = 192,
    backgrounds: str | Sequence[str] = "auto",
    kinds: str | Sequence[str] = "auto",
    num_objects: tuple[int, int] = (1, MAX_OBJECTS),
    crowded: bool = False,
) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Any non-negative integer; see `scene_seed` for the split it belongs to.
        size: Side of the square picture in pixels. Objects keep their size in pixels.
        backgrounds: Names from `BACKGROUNDS`, or "auto" for all that the installed packages allow.
        kinds: Names from `KINDS`, or "auto" for all that the installed packages allow.
        num_objects: Least and most objects of the uniform draw; a small picture may hold fewer.
        crowded: Allow several digits and words. Such a scene is for dense labels; its questions are unclear.
    """
    rng = random.Random(seed)
    background_names = _choose(backgrounds, BACKGROUNDS, "backgrounds", {"photo": "skimage"})
    kind_names = _choose(kinds, KINDS, "kinds", {"digit": "sklearn"})
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects={num_objects}: expected a least and a most number, both at least 1.")
    background = rng.choice(background_names)
    image = _draw_background(background, size, rng)
    objects: list[SceneObject] = []
    for kind in _draw_kinds(rng, kind_names, rng.randint(*num_objects), crowded):
        placed = _place(kind, objects, size, rng)
        if placed is not None:
            objects.append(_paint(placed, image, seed, rng))
    objects.sort(key=lambda item: (item.centre[1] // 8, item.centre[0]))
    return Scene(image, tuple(objects), background, seed)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every kind of question the scene can answer; existence comes in pairs of one yes and one no."""
    shapes = [item for item in scene.objects if item.kind == "shape"]
    asked = [Question("background", "what is the background?", scene.background, BACKGROUNDS)]
    for kind, prompt, choices in (
        ("digit", "which digit is shown?", tuple("0123456789")),
        ("word", "which word is written?", WORDS),
    ):
        asked += [Question(kind, prompt, item.text or "", choices) for item in scene.objects if item.kind == kind]
    for item in shapes:
        if sum(other.shape == item.shape for other in shapes) == 1:
            asked.append(Question("colour", f"what colour is the {item.shape}?", item.colour or "", tuple(COLOURS)))
        if sum(other.colour == item.colour for other in shapes) == 1:
            asked.append(Question("shape", f"what shape is {item.colour}?", item.shape or "", SHAPES))
    return asked + _counts(shapes, rng) + _existence(shapes, rng) + _relations(scene.objects, rng)


def scene_suite(split: str, num_per_category: int, seed: int) -> list[tuple[Scene, Question]]:
    """`num_per_category` questions of every category about held-out scenes; existence is half yes and half no.

    Categories whose objects need a package that is missing are refused, so that numbers always mean the same suite.
    """
    if split not in ("test", "val"):
        raise ValueError(
            f"split={split!r}: a suite is made of 'test' or 'val' scenes; 'train' scenes are for training."
        )
    rng = random.Random(f"{split}-{seed}")
    missing = dict.fromkeys(CATEGORIES, num_per_category)
    suite: list[tuple[Scene, Question]] = []
    while any(missing.values()):
        scene = draw_scene(scene_seed(split, rng.randrange(1 << _SPLIT_BITS)), backgrounds=BACKGROUNDS, kinds=KINDS)
        candidates = questions(scene, rng)
        rng.shuffle(candidates)
        # The rarest category the scene can answer takes it, one question per scene, so that questions are independent.
        for question in sorted(candidates, key=lambda question: -missing[question.category]):
            remaining = missing[question.category]
            wanted = ("yes", "no")[remaining % 2]
            if remaining and (question.category != "existence" or question.answer == wanted):
                suite.append((scene, question))
                missing[question.category] -= 1
                break
    return suite


def patch_labels(scene: Scene, grid: int) -> dict[str, torch.Tensor]:
    """Labels of the `grid` x `grid` cells of a scene, each of shape `[grid, grid, ...]`.

    `object`: index into `scene.objects`, -1 for background, -2 where an object covers only a part of the cell.
    `content`: 0 background, then shapes, digits and words in the order of `CONTENTS`; -100 where partly covered.
    `colour`: index into `COLOURS`, -100 where there is no shape. `centre`: 1 in the cell of an object's centre.
    `offset`: from the cell's middle to the object's centre and the object's height, in cells, 0 for background.
    `mask`: which of the cell's 4 x 4 parts an object covers.
    """
    size = scene.image.width
    cell = size / grid
    owner = np.full((grid, grid), -1, dtype=np.int64)
    content = np.zeros((grid, grid), dtype=np.int64)
    colour = np.full((grid, grid), -100, dtype=np.int64)
    centre = np.zeros((grid, grid), dtype=np.int64)
    offset = np.zeros((grid, grid, 3), dtype=np.float32)
    mask = np.zeros((grid, grid, 16), dtype=np.float32)
    rows, columns = np.mgrid[0:grid, 0:grid]
    for index, item in enumerate(scene.objects):
        parts = _coverage(item, size, grid)
        mask = np.maximum(mask, parts)
        coverage = parts.mean(-1)
        # A small object may cover no cell by two fifths; its best cell then stands for it.
        covered = coverage >= min(0.4, float(coverage.max()))
        touched = (coverage > 0.03) & ~covered
        owner[touched], content[touched] = -2, -100
        owner[covered], content[covered] = index, CONTENTS.index(item.text or item.shape)
        if item.colour is not None:
            colour[covered] = list(COLOURS).index(item.colour)
        x, y = item.centre
        centre[int(y / cell), int(x / cell)] = 1
        middle = np.stack([x / cell - columns - 0.5, y / cell - rows - 0.5], -1)
        height = (item.box[3] - item.box[1]) / cell
        offset[covered] = np.concatenate([middle, np.full_like(middle[..., :1], height)], -1)[covered]
    arrays = {"object": owner, "content": content, "colour": colour, "centre": centre, "offset": offset, "mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


CONTENTS: tuple[str | None, ...] = (None, *SHAPES, *"0123456789", *WORDS)


def _choose(
    wanted: str | Sequence[str], known: tuple[str, ...], argument: str, needs: dict[str, str]
) -> tuple[str, ...]:
    if wanted == "auto":
        return tuple(name for name in known if name not in needs or available(needs[name]))
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names or not set(names) <= set(known):
        raise ValueError(f"{argument}={wanted!r}: expected 'auto' or names from {', '.join(known)}.")
    for name in names:
        if name in needs and not available(needs[name]):
            raise missing(needs[name])
    return names


@functools.cache
def _photographs() -> tuple[Image.Image, ...]:
    from skimage import data

    pictures = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    for picture in pictures:
        picture.thumbnail((480, 480))
    return tuple(pictures)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_kinds(rng: random.Random, kinds: tuple[str, ...], number: int, crowded: bool) -> list[str]:
    """Cards first: they are the largest and the hardest to place."""
    if crowded:
        return sorted(rng.choices(kinds, k=number))
    cards = [kind for kind in kinds if kind != "shape" and rng.random() < 0.4][:number]
    if "shape" not in kinds:
        return cards or [rng.choice(kinds)]
    return cards + ["shape"] * (number - len(cards))


def _draw_background(name: str, size: int, rng: random.Random) -> Image.Image:
    if name == "photo":
        picture = rng.choice(_photographs())
        side = rng.randint(min(picture.size) // 3, min(picture.size))
        left, top = rng.randint(0, picture.width - side), rng.randint(0, picture.height - side)
        return picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    base = rng.randint(70, 225)
    paper = tuple(min(255, max(0, base + rng.randint(-18, 18))) for _ in range(3))
    if name == "plain":
        return Image.new("RGB", (size, size), paper)
    step = rng.choice((-1, 1)) * rng.randint(28, 50)
    ink = tuple(min(255, max(0, channel + step)) for channel in paper)
    rows, columns = np.mgrid[0:size, 0:size]
    period, shift = rng.randint(6, 12), rng.randint(0, 11)
    if name == "stripes":
        angle = rng.choice((0.0, 0.25, 0.5, 0.75)) * math.pi
        along = rows * math.sin(angle) + columns * math.cos(angle) + shift
        pattern = np.floor(along / (period / 2)) % 2 == 0
    elif name == "checks":
        pattern = ((rows + shift) // period + (columns + shift) // period) % 2 == 0
    else:
        middle = period / 2
        pattern = np.hypot((rows + shift) % period - middle, (columns + shift) % period - middle) < 0.3 * period
    pixels = np.where(pattern[..., None], np.array(ink, np.uint8), np.array(paper, np.uint8))
    return Image.fromarray(pixels)


def _place(kind: str, others: list[SceneObject], size: int, rng: random.Random) -> SceneObject | None:
    """An object somewhere free, or None if it is wider than the picture or after too many tries."""
    name = rng.choice(tuple(SIZES)) if kind == "shape" else "large"
    shape = rng.choice(SHAPES) if kind == "shape" else None
    colour = rng.choice(tuple(COLOURS)) if kind == "shape" else None
    text = rng.choice(WORDS) if kind == "word" else None
    if kind == "shape":
        width = height = rng.randint(*SIZES[name])
    elif kind == "digit":
        width = height = rng.randint(28, 34)
    else:
        font_size = rng.randint(17, 20)
        left, _, right, _ = _font(font_size).getbbox(text or "")
        width, height = int(right - left) + 8, font_size + 8
    if max(width, height) + 2 * _MARGIN > size:
        return None
    for _ in range(40):
        x, y = rng.randint(_MARGIN, size - width - _MARGIN), rng.randint(_MARGIN, size - height - _MARGIN)
        box = (float(x), float(y), float(x + width), float(y + height))
        if all(_apart(box, other.box) for other in others):
            outline, hole = _polygon(shape, box, rng)
            return SceneObject(kind, shape, colour, name, text, box, outline, hole)  # type: ignore[arg-type]
    return None


def _apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] + _MARGIN <= b[0] or b[2] + _MARGIN <= a[0] or a[3] + _MARGIN <= b[1] or b[3] + _MARGIN <= a[1]


def _polygon(shape: str | None, box: tuple[float, float, float, float], rng: random.Random):
    """Outline and hole of a shape that fills the box; None is the box itself."""
    x0, y0, x1, y1 = box
    x, y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    tilt = math.radians(rng.uniform(-12, 12))

    def corners(angles_and_radii):
        return tuple(
            (x + scale * radius * math.sin(angle + tilt), y - scale * radius * math.cos(angle + tilt))
            for angle, scale in angles_and_radii
        )

    if shape is None:
        return ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), ()
    if shape in ("circle", "ring"):
        circle = [(2 * math.pi * k / 32, 1.0) for k in range(32)]
        return corners(circle), corners([(angle, 0.5) for angle, _ in circle]) if shape == "ring" else ()
    if shape == "square":
        return corners([(math.pi * (k + 0.5) / 2, 1.15) for k in range(4)]), ()
    if shape == "triangle":
        return corners([(2 * math.pi * k / 3, 1.1) for k in range(3)]), ()
    if shape == "star":
        return corners([(math.pi * k / 5, 1.08 if k % 2 == 0 else 0.45) for k in range(10)]), ()
    arm = [(math.pi * k / 2 + side * math.atan(0.32), math.hypot(1.0, 0.32)) for k in range(4) for side in (-1, 1)]
    inner = [(math.pi * (k + 0.5) / 2, 0.32 * math.sqrt(2)) for k in range(4)]
    return corners([point for k in range(4) for point in (arm[2 * k], arm[2 * k + 1], inner[k])]), ()


def _paint(item: SceneObject, image: Image.Image, seed: int, rng: random.Random) -> SceneObject:
    """Draw the object; the returned object knows its digit, which is only chosen here."""
    if item.kind == "shape":
        fill = tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[item.colour or ""])
        edge = tuple(channel // 3 for channel in fill)
        _stencil(image, item.outline, item.hole, edge)
        _stencil(image, _shrink(item, item.outline, 1.5), _grow(item, item.hole, 1.5), fill)
        return item
    left, top, right, bottom = (int(edge) for edge in item.box)
    paper = rng.randint(232, 255)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=(paper,) * 3, outline=(60, 60, 60))
    if item.kind == "word":
        ink = tuple(rng.randint(0, 60) for _ in range(3))
        middle = ((left + right) / 2, (top + bottom) / 2)
        ImageDraw.Draw(image).text(middle, item.text or "", fill=ink, font=_font(bottom - top - 8), anchor="mm")
        return item
    strokes, digit = _handwriting(seed, rng)
    side = right - left - 4
    ink_mask = Image.fromarray(strokes).resize((side, side), Image.Resampling.BICUBIC)
    image.paste(tuple(rng.randint(0, 60) for _ in range(3)), (left + 2, top + 2), ink_mask)
    return SceneObject("digit", None, None, item.size, str(digit), item.box, item.outline)


def _handwriting(seed: int, rng: random.Random) -> tuple[np.ndarray, int]:
    """Strokes of a handwritten digit; one sample in ten is kept for val, one for test."""
    images, targets = _digits()
    while True:
        index = rng.randrange(len(targets))
        if {0: "val", 1: "test"}.get(index % 10, "train") == SPLITS[min(seed >> _SPLIT_BITS, 2)]:
            return (images[index] * (255 / 16)).astype(np.uint8), int(targets[index])


def _stencil(image: Image.Image, outline, hole, fill) -> None:
    """Fill a polygon with a hole, with smooth edges."""
    xs, ys = zip(*outline, strict=True)
    left, top = math.floor(min(xs)), math.floor(min(ys))
    width, height = math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1
    mask = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for polygon, value in ((outline, 255), (hole, 0)):
        if polygon:
            draw.polygon([((x - left) * _SUPERSAMPLING, (y - top) * _SUPERSAMPLING) for x, y in polygon], fill=value)
    image.paste(fill, (left, top), mask.reduce(_SUPERSAMPLING))


def _shrink(item: SceneObject, polygon, pixels: float):
    x, y = item.centre
    scale = 1 - pixels / ((item.box[2] - item.box[0]) / 2)
    return tuple((x + (px - x) * scale, y + (py - y) * scale) for px, py in polygon)


def _grow(item: SceneObject, polygon, pixels: float):
    return _shrink(item, polygon, -pixels)


def _coverage(item: SceneObject, size: int, grid: int) -> np.ndarray:
    """Which of the 4 x 4 parts of every grid cell the object covers, `[grid, grid, 16]`."""
    fine = grid * 4
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    for polygon, value in ((item.outline, 255), (item.hole, 0)):
        if polygon:
            draw.polygon([(x * fine / size, y * fine / size) for x, y in polygon], fill=value)
    parts = np.asarray(mask, np.float32).reshape(grid, 4, grid, 4) / 255
    return parts.transpose(0, 2, 1, 3).reshape(grid, grid, 16)


def _counts(shapes: list[SceneObject], rng: random.Random) -> list[Question]:
    numbers = tuple(str(number) for number in range(MAX_OBJECTS + 1))
    asked = [Question("count", "how many shapes are there?", str(len(shapes)), numbers)]
    if shapes:
        item = rng.choice(shapes)
        same_colour = sum(other.colour == item.colour for other in shapes)
        asked.append(Question("count", f"how many {item.colour} shapes are there?", str(same_colour), numbers))
    return asked


def _existence(shapes: list[SceneObject], rng: random.Random) -> list[Question]:
    """Two pairs of a yes and a no: one pair names a shape, the other a colour and a shape.

    Half of the negatives of the second pair use a colour and a shape that are both there, but not in one object.
    """
    if not shapes:
        return []
    asked = []
    present = {item.shape for item in shapes}
    absent = [shape for shape in SHAPES if shape not in present]
    if absent:
        asked += [(rng.choice(sorted(name for name in present if name)), "yes"), (rng.choice(absent), "no")]
    pairs = {(item.colour, item.shape) for item in shapes}
    mixed = sorted({(a.colour, b.shape) for a in shapes for b in shapes} - pairs)
    free = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in pairs]
    item = rng.choice(shapes)
    colour, shape = rng.choice(mixed if mixed and rng.random() < 0.5 else free)
    asked += [(f"{item.colour} {item.shape}", "yes"), (f"{colour} {shape}", "no")]
    return [Question("existence", f"is there a {noun}?", answer, ("yes", "no")) for noun, answer in asked]


def _relations(objects: tuple[SceneObject, ...], rng: random.Random) -> list[Question]:
    """A left/right and an above/below question, each about two objects with unique nouns, at least 32 pixels apart."""
    names = [item.name for item in objects]
    unique = [item for item in objects if names.count(item.name) == 1]
    asked = []
    for axis, first, second in ((0, "left", "right"), (1, "above", "below")):
        pairs = [(a, b) for a in unique for b in unique if abs(a.centre[axis] - b.centre[axis]) >= 32]
        if pairs:
            a, b = rng.choice(pairs)
            link = "left or right of" if axis == 0 else "above or below"
            answer = first if a.centre[axis] < b.centre[axis] else second
            asked.append(Question("relation", f"is the {a.name} {link} the {b.name}?", answer, (first, second)))
    return asked
