"""What `vtc calibrate` wrote for a method: beside a model card, or in a file of the user's."""

import importlib.resources
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtc.errors import SpecError


def stored_options(method: str, name: str, published: Iterable[str] = ()) -> dict[str, Any]:
    """Options of `method` that were calibrated for a checkpoint.

    Args:
        method: slug.
        name: a model card that has a calibration of the method (`<method>.json`), or the path of a file.
        published: names that the method knows by itself, for the message.

    Raises:
        SpecError: there is none, or the file was not written for this method.
    """
    card = Path(str(importlib.resources.files("vtc.model_cards"))) / name / f"{method}.json"
    path = card if card.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(published)
        known = f", nor one of: {names}" if names else ""
        raise SpecError(
            f"calibration={name!r} of method {method!r} is neither a model card that has one nor a file{known}. "
            f"`vtc calibrate {method} --out FILE` writes one for any model."
        )
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        options = dict(data["options"]) if data["method"] == method else {}
    except (OSError, ValueError, KeyError, TypeError):
        options = {}
    if not options:
        raise SpecError(
            f"{str(path)!r} is no calibration of method {method!r}. Write one with `vtc calibrate {method} --out FILE`."
        )
    return options
