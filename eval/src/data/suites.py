"""Questions about images with known answers: the drawn scenes, or a list of your own.

A suite says in `about` what it is made of, so that two results can be compared only where the questions are the same.
"""

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vtc.errors import InputError
from vtc.eval.scenes.draw import scene_suite
from vtc.loading import open_image

#: appended to questions for models that were not trained on one-word answers
ONE_WORD = "Answer the question using a single word or phrase."


Media = Literal["image", "video"]


@dataclass(frozen=True)
class Item:
    """One question about one image; several answers count as right.

    `media` says what the question is about. No suite holds videos yet, and `Prepared` refuses them.
    """

    image: Image.Image
    question: str
    answers: tuple[str, ...]
    category: str
    media: Media = "image"


@dataclass(frozen=True)
class Suite:
    """Items in a fixed order.

    Args:
        about: what the items are made of, as plain data.
        items: the questions.
        max_new_tokens: longest answer.
    """

    about: dict[str, Any]
    items: tuple[Item, ...]
    max_new_tokens: int

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order of their first question."""
        return tuple(dict.fromkeys(item.category for item in self.items))


def scenes(per_category: int, seed: int = 0, split: str = "test", one_word: bool = False) -> Suite:
    """Held-out questions about drawn scenes.

    Args:
        per_category: questions of each of the eight categories.
        one_word: whether to ask for one word; the embedded model answers so by itself.
    """
    about = {"name": "scenes", "split": split, "per_category": per_category, "seed": seed, "one_word": one_word}
    suffix = f"\n{ONE_WORD}" if one_word else ""
    items = tuple(
        Item(scene.image, question.prompt + suffix, (question.answer,), question.category)
        for scene, question in scene_suite(split, per_category, seed)
    )
    return Suite(about, items, max_new_tokens=16 if one_word else 4)


def from_file(path: Path, limit: int | None = None) -> Suite:
    """Questions from a JSON-lines file.

    Each line holds `image` (a path, relative to the file), `question`, `answer` (a text, or a list of texts of which
    each is right) and, if wanted, `category`.

    Raises:
        InputError: no such file, no question in it, a line that is no such object, or an image that cannot be read.
    """
    if not path.is_file():
        raise InputError(f"no file of questions at {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    items: list[Item] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (limit is not None and len(items) >= limit):
            continue
        try:
            row = json.loads(line)
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            image, question = path.parent / row["image"], str(row["question"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"line {number} of {str(path)!r} is no question ({error!r}). Write one JSON object per line: "
                '{"image": "a.png", "question": "...", "answer": "..."}.'
            ) from error
        category = str(row.get("category", "all"))
        items.append(Item(open_image(image), question, tuple(map(str, answers)), category))
    if not items:
        raise InputError(f"{str(path)!r} holds no question.")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Suite({"name": path.name, "sha256": digest, "limit": limit}, tuple(items), max_new_tokens=32)


def from_file_or_drawn(
    path: Path | None, limit: int | None, per_category: int, seed: int = 0, split: str = "test", one_word: bool = False
) -> Suite:
    """`from_file` where there is a file, else `scenes`."""
    return scenes(per_category, seed, split, one_word) if path is None else from_file(path, limit)


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """Whether an answer equals one of the expected ones, whatever its case, articles and punctuation."""
    return normal(answer) in {normal(text) for text in expected}


def normal(answer: str) -> str:
    """Lower case, without punctuation at the ends of words, without articles.

    Example:
        >>> normal("A  red Circle.")
        'red circle'
    """
    words = [word.strip(string.punctuation) for word in answer.lower().split()]
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))
