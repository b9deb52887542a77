"""Recorded inputs and outputs of the authors' own code: `<slug>__<case>.npz`, no pickles.

Tests look in their own folder and in the one that the environment variable VTC_GOLDEN names.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "VTC_GOLDEN"


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case.

    Example:
        case["in_q"] is a tensor, case.number("param_ratio") a Python number, "out_k" in case asks for an array.
    """

    path: Path

    @property
    def name(self) -> str:
        """What follows the slug: the kind of case and its sizes."""
        return self.path.stem.split("__", 1)[1]

    @property
    def arrays(self) -> Mapping[str, Any]:
        return np.load(self.path, allow_pickle=False)  # type: ignore[no-any-return]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def number(self, name: str) -> Any:
        """A scalar as a Python number."""
        return self.arrays[name].item()

    def __str__(self) -> str:
        return self.path.stem


def golden_cases(slug: str, *folders: Path, kind: str = "") -> list[GoldenCase]:
    """The cases of `slug` whose name starts with `kind`, from `folders` and from $VTC_GOLDEN, sorted by name."""
    extra = os.environ.get(ENVIRONMENT_VARIABLE)
    found: dict[str, Path] = {}
    for folder in (*folders, *([Path(extra)] if extra else [])):
        for path in sorted(folder.glob(f"{slug}__{kind}*.npz")):
            found.setdefault(path.name, path)
    return [GoldenCase(found[name]) for name in sorted(found)]
