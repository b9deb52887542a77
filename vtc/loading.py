"""Models and images, from disk, the hub or the package itself."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from vtc.errors import InputError, UnsupportedModelError
from vtc.settings import check_attention, check_device, check_dtype, check_model

#: folder in `vtc.model_cards` of the model that needs no download
EMBEDDED = "scenes-llava"


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, in eval mode."""

    name: str
    model: Any
    processor: Any

    def prompt(self, question: str) -> str:
        """The text of a prompt with one image."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        if getattr(self.processor, "chat_template", None):
            text: str = self.processor.apply_chat_template([message], add_generation_prompt=True)
            return text
        return f"USER: {self.processor.image_token}\n{question} ASSISTANT:"

    def inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        """Model inputs for one image and one question, on the model's device and in its dtype."""
        batch = self.processor(images=image, text=self.prompt(question), return_tensors="pt")
        return dict(batch.to(self.model.device, self.model.dtype))

    def batch(self, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        """Model inputs for one image and one question per sample, padded to the longest prompt."""
        prompts = [self.prompt(question) for question in questions]
        nested = [[image] for image in images]  # one list per prompt: a flat list is one prompt to some processors
        batch = self.processor(images=nested, text=prompts, return_tensors="pt", padding=True)
        return dict(batch.to(self.model.device, self.model.dtype))

    def answer(self, ids: torch.Tensor, prompt_length: int) -> str:
        """The generated text behind a prompt of `prompt_length` tokens."""
        text: str = self.processor.decode(ids[prompt_length:], skip_special_tokens=True)
        return text.strip()


def embedded_path() -> Path:
    """Where the embedded model lies.

    Raises:
        UnsupportedModelError: the package was built without it.
    """
    path = Path(str(importlib.resources.files("vtc.model_cards"))) / EMBEDDED
    if not (path / "config.json").exists():
        raise UnsupportedModelError(
            f"the embedded model is missing at {path}. Reinstall vtc-toolkit, or pass --model PATH_OR_ID."
        )
    return path


def load(
    name: str | None = None, device: str | None = None, dtype: str = "auto", attention: str | None = None
) -> Loaded:
    """Load a checkpoint with the stock classes; None is the embedded model.

    Args:
        name: folder or hub id.
        device: "cpu", "cuda", ...; None: CUDA if there is one.
        dtype: "float32", "bfloat16", "float16" or "auto" (float32 on CPU, the checkpoint's own on a GPU).
        attention: attn_implementation; None: the model's default.

    Raises:
        SpecError: device, dtype or attention is misspelled, or there is no such device; nothing was loaded then.
        UnsupportedModelError: the model cannot be loaded.
    """
    check_model(name)
    check_dtype(dtype)
    check_attention(attention)
    check_device(device)
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    source = str(embedded_path()) if name is None else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    show_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, device_map=device, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load {source!r}: {error}") from error
    finally:
        if show_progress:
            logging.enable_progress_bar()
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.padding_side = "left"  # generation goes on behind the prompt
    return Loaded(EMBEDDED if name is None else name, model.eval(), processor)


def open_image(path: str | Path) -> Image.Image:
    """The image at `path` in RGB.

    Raises:
        InputError: there is none, or it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"no image at {str(path)!r}.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(
            f"{str(path)!r} cannot be decoded as an image ({error}). Convert it to PNG or JPEG first."
        ) from error
