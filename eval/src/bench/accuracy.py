"""Answers of a model to a suite of questions, and what they are worth."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vtc.engine import Handle
from vtc.errors import UnsupportedFeatureError
from vtc.eval.data.suites import Suite, is_right
from vtc.eval.results.file import Cell
from vtc.eval.results.intervals import accuracy_table
from vtc.loading import Loaded
from vtc.report import Report


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Args:
        texts: one answer per question, in the order of the suite.
        reports: one per batch; none for the uncompressed model.
        seconds: wall time of all generation.
    """

    texts: tuple[str, ...]
    reports: tuple[Report, ...]
    seconds: float


class Prepared:
    """A suite as `batches` of model inputs: read, resized and tokenised once for all cells.

    Raises:
        UnsupportedFeatureError: a question is not about an image.
    """

    def __init__(self, loaded: Loaded, suite: Suite, batch_size: int) -> None:
        other = next((item for item in suite.items if item.media != "image"), None)
        if other is not None:
            raise UnsupportedFeatureError(
                f"{other.question!r} is about a {other.media}, and only questions about images can be asked yet. "
                "Leave it out of the suite."
            )
        self.loaded, self.suite = loaded, suite
        self.batches = list(self._prepare(batch_size))

    def _prepare(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        loaded = self.loaded
        for first in range(0, len(self.suite.items), batch_size):
            part = self.suite.items[first : first + batch_size]
            yield loaded.batch([item.image for item in part], [item.question for item in part])

    def answers(self, handle: Handle | None = None) -> Answers:
        """Answer every question greedily; `handle` is the patch in force."""
        texts: list[str] = []
        reports: list[Report] = []
        model = self.loaded.model
        start = time.perf_counter()
        for inputs in self.batches:
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=self.suite.max_new_tokens, do_sample=False)
            length = inputs["input_ids"].shape[1]
            texts += [self.loaded.answer(row, length) for row in ids]
            if handle is not None:
                reports.append(handle.report)
        return Answers(tuple(texts), tuple(reports), time.perf_counter() - start)


def score(suite: Suite, answers: Answers) -> Cell:
    """Accuracy per category with Wilson intervals, and the single answers."""
    right = [is_right(text, item.answers) for item, text in zip(suite.items, answers.texts, strict=True)]
    counts = dict.fromkeys(suite.categories, (0, 0))
    for item, hit in zip(suite.items, right, strict=True):
        hits, number = counts[item.category]
        counts[item.category] = (hits + hit, number + 1)
    return {
        "accuracy": accuracy_table(counts),
        "correct": "".join("01"[hit] for hit in right),
        "answers": list(answers.texts),
        "seconds": round(answers.seconds, 2),
    }


def costs(reports: Sequence[Report]) -> Cell:
    """Token counts in the three conventions, FLOPs of the LLM's prefill and KV bytes, as means over samples."""
    samples = sum(len(report.visual_tokens) for report in reports)

    def mean(values: Iterator[float]) -> float:
        return round(sum(values) / samples, 2)

    return {
        "tokens": {
            "before": mean(n for report in reports for n in report.visual_tokens),
            "entering_llm": mean(n for report in reports for n in report.entering),
            "after_last_cut": mean(n for report in reports for n in report.after_last_cut),
            "layer_average": mean(n for report in reports for n in report.layer_average),
        },
        "flops": round(sum(report.flops for report in reports) / samples),
        "flops_dense": round(sum(report.flops_dense for report in reports) / samples),
        "kv_bytes": round(sum(report.kv_bytes for report in reports) / samples),
        "kv_bytes_dense": round(sum(report.kv_bytes_dense for report in reports) / samples),
        "notes": sorted({note for report in reports for note in report.notes}),
    }
