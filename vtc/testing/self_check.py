"""Does vtc tell the truth with the versions that are installed here? `vtc doctor --self-check`.

Random-weight twins run compressed and, masked, uncompressed: a prefill, a ragged batch, decoded tokens, a second turn
on the same cache, a stage in the LLM and one behind the vision tower. It needs no download, and takes seconds a family.
"""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc.catalogue.names import check_families
from vtc.engine.host import contract
from vtc.testing.oracle_table import decoded_difference, prefill_difference, second_turn_difference
from vtc.testing.tiny import PROMPTS, TinyModel, families, tiny

#: the largest relative difference in fp32 that passes (ours are near 1e-6)
LIMIT = 1e-5

DOOR, TOWER, LAYER = "random:5", "fastervlm:6(score=received)", "fastv@3:4"

#: what is compared, by name: from a family's twin the relative difference to the masked full model
CASES: dict[str, Callable[[TinyModel], float]] = {
    "prefill": lambda one: prefill_difference(one, one.inputs(PROMPTS[:1]), DOOR),
    "ragged batch": lambda one: prefill_difference(one, one.inputs(PROMPTS), DOOR),
    "decode steps": lambda one: decoded_difference(one, one.inputs(PROMPTS[:1]), DOOR),
    "decode steps, ragged batch": lambda one: decoded_difference(one, one.inputs(PROMPTS), DOOR),
    "second turn": lambda one: second_turn_difference(one, one.inputs(PROMPTS[:1]), DOOR),
    "stage in the LLM": lambda one: decoded_difference(one, one.inputs(PROMPTS), LAYER),
    "stage behind the tower": lambda one: decoded_difference(one, one.inputs(PROMPTS), TOWER),
}


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Args:
        family: the family.
        attention: "sdpa" or "eager".
        case: which of `CASES`.
        difference: max |logits - expected| / max |expected|; infinite where it is NaN or the run failed.
        error: what the run raised, or "".
    """

    family: str
    attention: str
    case: str
    difference: float
    error: str = ""


@dataclass(frozen=True)
class SelfCheck:
    """What was compared with which versions.

    Args:
        versions: package -> version.
        tested: whether this version of transformers lies in the range that was tested for this release.
        limit: the largest difference that passes.
        compared: every comparison.
    """

    versions: dict[str, str]
    tested: bool
    limit: float
    compared: tuple[Compared, ...]

    @property
    def passed(self) -> bool:
        """Whether no comparison differs by more than the limit."""
        return all(one.difference <= self.limit for one in self.compared)

    def worst(self) -> tuple[Compared, ...]:
        """The largest difference of each case of each family, over the attention implementations."""
        found: dict[tuple[str, str], Compared] = {}
        for one in self.compared:
            key = one.family, one.case
            if key not in found or one.difference > found[key].difference:
                found[key] = one
        return tuple(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite difference is None there."""
        compared = [
            {**vars(one), "difference": one.difference if math.isfinite(one.difference) else None}
            for one in self.compared
        ]
        return {**vars(self), "passed": self.passed, "compared": compared}


def self_check(
    family: str | Sequence[str] | None = None, attention: Sequence[str] = ("sdpa", "eager"), limit: float = LIMIT
) -> SelfCheck:
    """Compare compressed random-weight models with the masked full model on the installed versions.

    Runs on versions outside the tested range too, which `vtc.patch` refuses.

    Args:
        family: a family, or several; None: all. `vtc models` lists them.
        attention: attention implementations.
        limit: the largest relative difference that passes.

    Raises:
        UnsupportedModelError: there is no such family.
    """
    chosen = families() if family is None else (family,) if isinstance(family, str) else tuple(family)
    check_families(chosen)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on several
    try:
        with contract.untested():
            found = [
                _compare(name, implementation, case)
                for name in chosen
                for implementation in attention
                for case in CASES
            ]
    finally:
        torch.set_num_threads(threads)
    return SelfCheck(versions(), contract.is_tested(contract.installed()), limit, tuple(found))


def versions() -> dict[str, str]:
    """The versions that a bug report needs."""
    import vtc

    return {
        "vtc": vtc.__version__,
        "transformers": contract.installed(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _compare(family: str, attention: str, case: str) -> Compared:
    try:
        return Compared(family, attention, case, CASES[case](tiny(family, attention)))
    except Exception as error:  # whatever a changed host raises is a finding
        return Compared(family, attention, case, float("inf"), f"{type(error).__name__}: {error}")
