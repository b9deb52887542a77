"""Wall-clock medians of calls that are compared with each other in one run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch


class Quantiles(TypedDict):
    """`Timing` in a file."""

    median: float
    p20: float
    p80: float
    runs: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and the 20 % and 80 % quantiles of `runs` calls."""

    median: float
    p20: float
    p80: float
    runs: int

    def to_dict(self, digits: int | None = 3) -> Quantiles:
        """Plain data for JSON; `digits` None: as measured."""
        median, p20, p80 = (
            value if digits is None else round(value, digits) for value in (self.median, self.p20, self.p80)
        )
        return {"median": median, "p20": p20, "p80": p80, "runs": self.runs}


def compare(
    calls: Mapping[str, Callable[[], object]], device: torch.device, runs: int = 7, warmup: int = 2
) -> dict[str, Timing]:
    """Time `calls` in turns, so that a slow moment of the machine hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= warmup:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: summary(values) for name, values in samples.items()}


def summary(values: Sequence[float]) -> Timing:
    """Median and quantiles of the milliseconds of some calls."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[1], cuts[7], len(values))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
