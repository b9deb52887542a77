"""Methods x budgets x tasks through lmms-eval on one loaded model, beside the dense model of the same run.

The unit of work is one task with one method at one budget. Each is written to the result file when it is finished, so
a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from vtc.errors import EvaluationError, InputError, SpecError, UnsupportedModelError, VTCError, unknown_name
from vtc.eval.lmms import timings
from vtc.eval.lmms.models import BASES, EMBEDDED, PREFIX, base_of, wrapped
from vtc.eval.lmms.watch import RunFailed
from vtc.eval.results.environment import environment
from vtc.eval.results.file import DENSE, SCHEMA, Cell, Result, Run, Task, fill_in, read, run_of, write
from vtc.eval.results.intervals import Share, wilson
from vtc.extras import require
from vtc.spec import format_spec, parse

#: the task files that ship with the package, for `lmms_eval --include_path`
TASKS = Path(str(resources.files("vtc.eval"))) / "tasks"


@dataclass(frozen=True)
class Settings:
    """What one result file is about.

    Args:
        tasks: names of lmms-eval tasks, groups or tags.
        model: folder or hub id; None is the embedded model.
        base: lmms-eval's model id, such as "llava_hf"; None: the one that loads the model's type.
        positions: position policy, as for `vtc.patch`.
        limit: first questions of each task; None for all.
        simple: use lmms-eval's simple class although it has a chat class.
        model_args: further arguments of lmms-eval's model class.
    """

    tasks: tuple[str, ...]
    model: str | None = None
    base: str | None = None
    positions: str = "auto"
    limit: int | None = None
    batch_size: int = 1
    simple: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)

    def about(self) -> Run:
        """The `run` block of the result file; results with equal `suite` blocks asked the same questions."""
        return {
            "model": self.model or EMBEDDED,
            "suite": {
                "name": "lmms-eval",
                "version": metadata.version("lmms-eval"),
                "tasks": list(self.tasks),
                "limit": self.limit,
            },
            "base": self.base,
            "positions": self.positions,
            "batch_size": self.batch_size,
            "simple": self.simple,
            "model_args": self.model_args,
        }


def sweep(
    settings: Settings,
    specs: Sequence[str],
    *,
    device: str | None = None,
    include: Sequence[Path] = (),
    path: Path | None = None,
    keep_going: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run the dense model and every spec on every task.

    Under `accelerate launch` all processes call this with the same arguments; the questions are shared out, and the
    first process writes the file.

    Args:
        specs: spec strings with their budgets.
        device: "cpu", "cuda", ...; None: a GPU if there is one.
        include: folders with further task files.
        path: result file; what it holds for the same settings is not run again.
        keep_going: go on with the next spec after a failure; it is written down as `failed`.
        progress: called with a line for each finished task.

    Returns:
        The content of the result file; in other processes than the first it has no cells. A method that the model
        refuses has `refused` with the reason instead of scores.

    Raises:
        SpecError, UnsupportedModelError, MissingExtraError: nothing has run then.
        EvaluationError: a run failed; its cause is the error that was raised.
    """
    with contextlib.redirect_stdout(sys.stderr):  # tasks and lmms-eval print; the result is the caller's to print
        require("lmms_eval")
        _log_to_stderr()
        for text in specs:
            parse(text)
        if keep_going and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SpecError(
                "keep_going needs one process: after a failure the others would wait for the one that failed."
            )
        manager = _tasks(settings, include)
        lm = _load(settings, device)
        run = _Sweep(settings, lm, manager, path, keep_going, progress, _opened(settings, lm.device, path))
        cells = run.result["cells"]
        done = _from_first({name: [*cell.get("tasks", {})] for name, cell in cells.items()})
        wanted: list[tuple[str, str | None]] = [(DENSE, None), *((format_spec(parse(text)), text) for text in specs)]
        for name, spec in wanted:
            run.fill(name, spec, done.get(name, ()))
        lm.watch.close()
    return run.result


@dataclass(frozen=True)
class _Sweep:
    """What every cell of a sweep needs; `result` is filled."""

    settings: Settings
    lm: Any
    manager: Any
    path: Path | None
    keep_going: bool
    progress: Callable[[str], None]
    result: Result

    def fill(self, name: str, spec: str | None, done: Sequence[str]) -> None:
        """Run the tasks of one cell that are not done yet."""
        watch, cell = self.lm.watch, self.result["cells"].setdefault(name, Cell())
        try:
            watch.patch(spec, **({"positions": self.settings.positions} if spec else {}))
        except VTCError as error:
            self.result["cells"][name] = {"refused": str(error)}
            self._save(f"{name}: refused, {error}")
            return
        if spec is not None:
            cell |= _named(spec) | {"spec": watch.handle.spec, "positions": watch.handle.positions}
        cell.pop("failed", None)
        for task in self.settings.tasks:
            if task not in done and not self._answer(name, cell, task):
                break

    def _answer(self, name: str, cell: Cell, task: str) -> bool:
        """Run one task; whether the next one of the cell can be run.

        Raises:
            EvaluationError: it failed, and the sweep is not to go on.
        """
        try:
            record = _one(self.lm, task, self.manager, self.settings, _files(self.path, name))
        except RunFailed as error:
            cell["failed"] = f"{task}: {error}"
            self._save(f"{name}: {task} failed, {error}")
            if self.keep_going:
                return False
            raise EvaluationError(f"{name} on {task}: {error}") from error.__cause__
        if record is not None:
            cell.setdefault("tasks", {})[task] = record
            _summarise(cell, self.settings.tasks)
            self._save(f"{name}: {task} {_short(record)} ({record['seconds']:.0f} s)")
        return True

    def _save(self, line: str) -> None:
        """Write the file, then tell `progress`."""
        # cells are compared question by question, so only those that ran all tasks can be
        tasks, cells = set(self.settings.tasks), self.result["cells"]
        fill_in({name: cell for name, cell in cells.items() if tasks <= set(cell.get("tasks", ()))})
        if self.path is not None and _rank() == 0:
            write(self.result, self.path)
        self.progress(line)


def _opened(settings: Settings, device: Any, path: Path | None) -> Result:
    """An empty result, or the one at `path`, which the first process reads.

    Raises:
        InputError: it is about other settings.
    """
    result: Result = {"schema": SCHEMA, "run": settings.about(), "environment": environment(device), "cells": {}}
    if path is not None and path.exists() and _rank() == 0:
        stored = read(path)
        if run_of(stored) != result["run"]:
            raise InputError(f"{str(path)!r} is about other settings. Name another file with --out, or delete it.")
        result["cells"] = stored["cells"]
    return result


def _tasks(settings: Settings, include: Sequence[Path]) -> Any:
    """The task manager, which knows all names.

    Raises:
        SpecError: it does not know one of them.
    """
    from lmms_eval.tasks import TaskManager

    # prompts of some tasks depend on the model's name: the names of lmms-eval's own classes, not of ours
    name = PREFIX + EMBEDDED if settings.model is None else _base(settings)
    manager = TaskManager("ERROR", include_path=[str(TASKS), *map(str, include)], model_name=name)
    for task in settings.tasks:
        if task not in manager.task_index:
            raise unknown_name("task", task, manager.task_index, "lmms-eval tasks list")
    return manager


def _base(settings: Settings) -> str:
    from transformers import AutoConfig

    if settings.model is None:
        return "llava_hf"
    if settings.base is not None:
        if settings.base not in BASES:
            raise SpecError(f"lmms-eval model {settings.base!r} is not wrapped. Wrapped: {', '.join(BASES)}.")
        return settings.base
    try:
        return base_of(AutoConfig.from_pretrained(settings.model).model_type)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read the config of {settings.model!r}: {error}") from error


def _load(settings: Settings, device: str | None) -> Any:
    """The lmms-eval model, dense.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    from lmms_eval.models import get_model_manifest

    base = _base(settings)
    kind = "simple" if settings.simple or get_model_manifest(base).chat_class_path is None else "chat"
    cls = wrapped(kind, EMBEDDED if settings.model is None else base)
    where = {} if settings.model is None else {"pretrained": settings.model}
    try:
        lm = cls(**where, device=device, batch_size=settings.batch_size, **settings.model_args)
    except RunFailed as error:
        if isinstance(error.__cause__, VTCError):
            raise error.__cause__ from None
        raise EvaluationError(f"cannot load {settings.model or EMBEDDED!r}: {error}") from error.__cause__
    lm.keep_loaded = True
    return lm


def _one(lm: Any, task: str, manager: Any, settings: Settings, files: Path) -> Task | None:
    """Scores, single answers and measurements of one task; None in other processes than the first.

    Raises:
        RunFailed: something went wrong.
    """
    from lmms_eval.evaluator import simple_evaluate

    lm.watch.requests.clear()
    start = time.perf_counter()
    try:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            batch_size=settings.batch_size,
            limit=settings.limit,
            bootstrap_iters=0,
            verbosity="ERROR",
            # scorers ask it for the folder of the files that they write
            cli_args=argparse.Namespace(output_path=str(files), process_with_media=False),
        )
    except Exception as error:  # data that cannot be read, a scorer that fails: all end the run, with their cause
        raise RunFailed(f"{type(error).__name__}: {error}") from error
    measured = [record for part in _to_first(list(lm.watch.requests)) for record in part]
    if found is None:
        return None
    return {
        "scores": {name: _metrics(values) for name, values in found["results"].items() if _metrics(values)},
        "samples": {name: _samples(rows) for name, rows in found["samples"].items()},
        "requests": timings.columns(measured),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's "metric,filter" entries that are numbers, without standard errors."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float) and value == value
    }


def _samples(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Answers and single scores of one task, in the order of its questions; no scores where the scorer gives none."""
    rows = sorted(rows, key=lambda row: row["doc_id"])
    scores = [_score(row) for row in rows]
    return {
        "ids": [row["doc_id"] for row in rows],
        "answers": [_text(row["filtered_resps"]) for row in rows],
        "scores": None if None in scores else scores,
    }


def _score(row: dict[str, Any]) -> float | None:
    known = ("doc_id", "target", "doc_hash")
    for name, value in row.items():
        number = value.get("score") if isinstance(value, dict) and name != "doc" else value
        if name not in known and isinstance(number, int | float):
            return round(float(number), 4)
    return None


def _text(answer: Any) -> str:
    while isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, str) else json.dumps(answer)


def _named(spec: str) -> Cell:
    """The spec without its budget, and the budget, where it has one and only one."""
    found = parse(spec)
    if len(found) > 1 or found[0].budget is None:
        return {"method": format_spec(found), "budget": None}
    return {"method": format_spec(replace(found[0], budget=None)), "budget": str(found[0].budget)}


def _summarise(cell: Cell, tasks: Sequence[str]) -> None:
    """The fields that `vtc bench` results have: accuracy, correct, answers, tokens and costs; and medians of times."""
    cell.pop("accuracy", None)
    cell.pop("correct", None)
    cell.pop("against", None)
    parts = [cell["tasks"][task] for task in tasks if task in cell["tasks"]]
    samples = [(name, rows) for part in parts for name, rows in part["samples"].items()]
    scored = {name: rows["scores"] for name, rows in samples if rows["scores"] and max(rows["scores"]) <= 1}
    if scored:
        values = [value for scores in scored.values() for value in scores]
        cell["accuracy"] = {name: _share(scores) for name, scores in {**scored, "overall": values}.items()}
        if all(value in (0, 1) for value in values):
            cell["correct"] = "".join("01"[int(value)] for value in values)
    cell["answers"] = [text for _, rows in samples for text in rows["answers"]]
    requests = [part["requests"] for part in parts]
    cell |= timings.counts(requests)
    for name, milliseconds in timings.times(requests).items():
        cell[name] = milliseconds
    cell["seconds"] = round(sum(part["seconds"] for part in parts), 2)


def _share(scores: Sequence[float]) -> Share:
    # scores between 0 and 1 vary less than right and wrong with the same mean, so the interval is on the safe side
    right, number = sum(scores), len(scores)
    low, high = wilson(right, number)
    right = int(right) if right == int(right) else round(right, 4)
    return {
        "accuracy": round(right / number, 4),
        "right": right,
        "questions": number,
        "wilson95": [round(low, 4), round(high, 4)],
    }


def _short(record: Task) -> str:
    name, scores = next(iter(record["scores"].items()), ("", {}))
    return ", ".join(f"{metric} {value:.4g}" for metric, value in scores.items()) or name


def _files(path: Path | None, name: str) -> Path:
    """Where scorers write their files for one cell."""
    folder = Path(tempfile.mkdtemp(prefix="vtc-eval-")) if path is None else path.with_suffix(".files")
    return folder / re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def _log_to_stderr() -> None:
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _distributed() -> Any:
    import torch.distributed

    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if ready and torch.distributed.get_world_size() > 1 else None


def _from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if (group := _distributed()) is None:
        return value
    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def _to_first(value: Any) -> list[Any]:
    """Every process's value, in the first process; only the own in others."""
    if (group := _distributed()) is None:
        return [value]
    box: list[Any] | None = [None] * group.get_world_size() if group.get_rank() == 0 else None
    group.gather_object(value, box, dst=0)
    return [value] if box is None else box
