"""Shares of right answers with their 95 % intervals."""

import math
from typing import TypedDict


class Share(TypedDict):
    """A share of right answers; `right` is no whole number where single answers score between 0 and 1."""

    accuracy: float
    right: float
    questions: int
    wilson95: list[float]


def wilson(right: int | float, number: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z = 1.959964
    centre = (right + z * z / 2) / (number + z * z)
    half = z / (number + z * z) * math.sqrt(right * (number - right) / number + z * z / 4)
    return centre - half, centre + half


def accuracy_table(counts: dict[str, tuple[int, int]]) -> dict[str, Share]:
    """Accuracy, counts and interval per category and over all."""
    whole = (sum(right for right, _ in counts.values()), sum(number for _, number in counts.values()))
    return {
        name: {"accuracy": round(right / number, 4), "right": right, "questions": number,
               "wilson95": [round(bound, 4) for bound in wilson(right, number)]}
        for name, (right, number) in {**counts, "overall": whole}.items()
    }  # fmt: skip
