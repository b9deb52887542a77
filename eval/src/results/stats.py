"""Paired comparison of two runs over the same questions, and of two sets of timed calls.

Two systems that answer the same questions differ only where one is right and the other is wrong. With `lost` questions
that only the first got right and `won` that only the second got right:

    exact McNemar test   p = min(1, 2 * P[Binomial(lost + won, 1/2) <= min(lost, won)])
    interval             95 % percentile bootstrap over questions of (won - lost) / questions

Without the answers of single questions the interval of the difference is Newcombe's hybrid of two Wilson intervals
(Statistics in Medicine 17, 1998, method 10).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from vtc.eval.results.intervals import wilson

RESAMPLES = 10_000


class Difference(TypedDict):
    """`Paired` in a file."""

    difference: float
    low: float
    high: float
    lost: int | None
    won: int | None
    p: float | None


class Agreement(TypedDict):
    """A share of equal answers, with its Wilson interval."""

    share: float
    wilson95: list[float]


@dataclass(frozen=True)
class Paired:
    """The second system against the first.

    Args:
        difference: share of right answers of the second minus that of the first.
        low, high: its 95 % interval.
        lost, won: questions that only the first, only the second answered rightly; None without single answers.
        p: of the exact McNemar test, two-sided; None without single answers.
    """

    difference: float
    low: float
    high: float
    lost: int | None = None
    won: int | None = None
    p: float | None = None

    def to_dict(self) -> Difference:
        """Plain data for JSON, rounded."""
        return {
            "difference": round(self.difference, 6),
            "low": round(self.low, 6),
            "high": round(self.high, 6),
            "lost": self.lost,
            "won": self.won,
            "p": None if self.p is None else round(self.p, 6),
        }


def paired(first: Sequence[int], second: Sequence[int], seed: int = 0) -> Paired:
    """Compare right (1) and wrong (0) answers to the same questions.

    Raises:
        ValueError: not as many answers.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be compared question by question.")
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    number = len(first)
    shares = [lost / number, won / number, (number - lost - won) / number]
    drawn = np.random.default_rng(seed).multinomial(number, shares, size=RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / number, [0.025, 0.975])
    return Paired((won - lost) / number, float(low), float(high), lost, won, mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p-value of the exact McNemar test.

    Example:
        >>> mcnemar(8, 1)
        0.0390625
    """
    trials = lost + won
    tail = sum(math.comb(trials, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**trials)


def unpaired(first: tuple[int | float, int], second: tuple[int | float, int]) -> Paired:
    """Compare two (right, questions) counts of which single answers are not known."""
    a, b = first[0] / first[1], second[0] / second[1]
    (low_a, high_a), (low_b, high_b) = wilson(*first), wilson(*second)
    difference = b - a
    return Paired(
        difference,
        difference - math.hypot(b - low_b, high_a - a),
        difference + math.hypot(high_b - b, a - low_a),
    )


def median_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the second minus median of the first, with its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    medians = []
    for samples in (first, second):
        values = np.asarray(samples, dtype=float)
        medians.append(np.median(rng.choice(values, size=(RESAMPLES, len(values))), axis=1))
    low, high = np.quantile(medians[1] - medians[0], [0.025, 0.975])
    return float(np.median(second) - np.median(first)), float(low), float(high)


def loyalty(answers: Sequence[str], dense: Sequence[str]) -> Agreement:
    """Share of answers that are those of the uncompressed model, right or wrong, with its Wilson interval."""
    same = sum(a == b for a, b in zip(answers, dense, strict=True))
    low, high = wilson(same, len(dense))
    return {"share": round(same / len(dense), 4), "wilson95": [round(low, 4), round(high, 4)]}
