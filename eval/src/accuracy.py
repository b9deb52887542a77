"""Accuracy of methods at token budgets on the drawn scenes, beside the dense model and the controls.

One cell is one method at one budget. Cells are written to the result file as they are finished, so a run that was
stopped goes on where it was.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vtc.engine import compress
from vtc.errors import VTCError
from vtc.eval.environment import environment
from vtc.eval.intervals import accuracy_table
from vtc.eval.loading import Loaded
from vtc.eval.scenes import CATEGORIES, Question, Scene, scene_suite

VERSION = 1
DENSE = "dense"
Suite = Sequence[tuple[Scene, Question]]


def sweep(
    loaded: Loaded,
    methods: Sequence[str],
    budgets: Sequence[int | float],
    per_category: int,
    *,
    positions: str = "auto",
    seed: int = 0,
    batch_size: int = 8,
    path: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run every method at every budget, and the dense model once.

    Args:
        per_category: held-out questions of each category.
        positions: position policy, as for `vtc.patch`.
        path: result file; cells that it already holds for the same suite are not run again.
        progress: called with a line for each finished cell.

    Returns:
        The content of the result file: `suite`, `environment` and one entry of `cells` per method and budget, with
        accuracy per category (Wilson intervals), agreement with the dense answers, token counts and milliseconds. A
        method that the model refuses has `refused` with the reason instead.
    """
    about = {"version": VERSION, "model": loaded.name, "split": "test", "per_category": per_category, "seed": seed}
    about["positions"] = positions
    result: dict[str, Any] = {"suite": about, "environment": environment(loaded.model.device), "cells": {}}
    if path is not None and path.exists():
        stored = json.loads(path.read_text())
        if stored["suite"] == about:
            result["cells"] = stored["cells"]
    suite = scene_suite("test", per_category, seed)
    for name, spec, budget in _cells(methods, budgets):
        if name in result["cells"]:
            continue
        cell = _cell(loaded, suite, spec, budget, positions, batch_size)
        if spec is not None and "answers" in cell:
            dense = result["cells"][DENSE]["answers"]
            same = sum(a == b for a, b in zip(cell["answers"], dense, strict=True))
            cell["agreement_with_dense"] = round(same / len(dense), 4)
        result["cells"][name] = cell
        if path is not None:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1))
            part.replace(path)
        progress(f"{name}: {cell['accuracy']['overall']['accuracy']:.1%}" if "accuracy" in cell else f"{name}: refused")
    return result


def _cells(methods: Sequence[str], budgets: Sequence[int | float]) -> Iterator[tuple[str, str | None, Any]]:
    yield DENSE, None, None
    for spec in methods:
        for budget in budgets:
            yield f"{spec}:{budget}", spec, budget


def _cell(
    loaded: Loaded, suite: Suite, spec: str | None, budget: Any, positions: str, batch_size: int
) -> dict[str, Any]:
    if spec is None:
        answers, seconds, _ = _answers(loaded, suite, batch_size, None)
        return _scored(suite, answers, seconds, {})
    try:
        with compress(loaded.model, spec, budget, positions=positions) as handle:
            answers, seconds, report = _answers(loaded, suite, batch_size, handle)
    except VTCError as error:
        return {"refused": str(error)}
    tokens = {
        "before": report.visual_tokens[0],
        "entering_llm": report.entering[0],
        "after_last_cut": report.after_last_cut[0],
        "layer_average": report.layer_average[0],
    }
    cost = {
        "flops": report.flops / len(report.visual_tokens),
        "flops_dense": report.flops_dense / len(report.visual_tokens),
    }
    return _scored(
        suite, answers, seconds, {"spec": handle.spec, "positions": handle.positions, "tokens": tokens, **cost}
    )


def _answers(loaded: Loaded, suite: Suite, batch_size: int, handle: Any) -> tuple[list[str], float, Any]:
    answers: list[str] = []
    report = None
    start = time.perf_counter()
    for first in range(0, len(suite), batch_size):
        part = suite[first : first + batch_size]
        texts = [loaded.prompt(question.prompt) for _, question in part]
        images = [scene.image for scene, _ in part]
        batch = loaded.processor(images=images, text=texts, return_tensors="pt", padding=True)
        inputs = dict(batch.to(loaded.model.device, loaded.model.dtype))
        with torch.inference_mode():
            ids = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        answers += [loaded.answer(row, length) for row in ids]
        report = report or (handle.report if handle is not None else None)
    return answers, time.perf_counter() - start, report


def _scored(suite: Suite, answers: list[str], seconds: float, about: dict[str, Any]) -> dict[str, Any]:
    counts = {category: [0, 0] for category in CATEGORIES}
    for (_, question), answer in zip(suite, answers, strict=True):
        counts[question.category][0] += answer == question.answer
        counts[question.category][1] += 1
    table = accuracy_table({name: (right, number) for name, (right, number) in counts.items()})
    return {**about, "accuracy": table, "seconds": round(seconds, 2), "answers": answers}


def markdown(result: dict[str, Any]) -> str:
    """The result file as a Markdown table: one row per method, one column per budget, Wilson 95 % intervals."""
    cells = result["cells"]
    budgets = list(dict.fromkeys(name.rpartition(":")[2] for name in cells if name != DENSE))
    specs = list(dict.fromkeys(name.rpartition(":")[0] for name in cells if name != DENSE))
    rows = [
        "| method | " + " | ".join(f"{budget} tokens" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    rows += [f"| `{spec}` | " + " | ".join(_share(cells.get(f"{spec}:{b}")) for b in budgets) + " |" for spec in specs]
    questions = cells[DENSE]["accuracy"]["overall"]["questions"]
    rows += [
        "",
        f"All tokens: {_share(cells[DENSE])} of {questions} held-out questions, 95 % intervals in parentheses.",
    ]
    return "\n".join(rows)


def _share(cell: dict[str, Any] | None) -> str:
    if cell is None or "accuracy" not in cell:
        return "refused" if cell else ""
    whole = cell["accuracy"]["overall"]
    low, high = (round(100 * bound) for bound in whole["wilson95"])
    return f"{100 * whole['accuracy']:.1f} % ({low}-{high})"
