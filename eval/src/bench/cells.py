"""Accuracy, time and memory of methods at token budgets, beside the dense model, the ideal and the controls.

One cell is one method at one budget. The result file is written after each cell, so a run that was stopped, by whatever
means, goes on with the cell that it was in.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc import flops
from vtc.adapter import Adapter
from vtc.catalogue.registry import method_class, methods
from vtc.engine import Handle, compress
from vtc.engine.host import names
from vtc.errors import InputError, VTCError
from vtc.eval.bench.accuracy import costs, score
from vtc.eval.bench.costs import observed_encoder
from vtc.eval.bench.ideal import ideal
from vtc.eval.bench.latency import Phases, Variant, measure
from vtc.eval.bench.subject import Subject
from vtc.eval.results.environment import environment
from vtc.eval.results.file import (
    DENSE,
    IDEAL,
    SCHEMA,
    Cell,
    Kind,
    Latency,
    Result,
    Run,
    complete,
    read,
    reason_of,
    state_of,
    write,
)
from vtc.eval.results.timing import Quantiles
from vtc.report import Report
from vtc.spec import parse

Budgets = Sequence[int | float]
Progress = Callable[[str, Cell | None], None]


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Args:
        positions: position policy, as for `vtc.patch`.
        batches: batch sizes that are timed; none: nothing is timed.
        runs, warmup: timed calls of each cell and calls before them; dense calls take turns with them.
        new_tokens: tokens decoded behind the first one.
        memory: whether peak memory is measured; on CUDA only.
    """

    positions: str = "auto"
    batches: tuple[int, ...] = (1,)
    runs: int = 5
    warmup: int = 1
    new_tokens: int = 8
    memory: bool = True


@dataclass(frozen=True)
class Plan:
    """One cell to be filled; `spec` is None for the dense model and the ideal."""

    name: str
    kind: Kind
    spec: str | None = None
    budget: int | float | None = None


def image_methods() -> tuple[str, ...]:
    """Every registered method that is not only for videos."""
    return tuple(slug for slug in methods() if "video" not in method_class(slug).tags)


def controls() -> tuple[str, ...]:
    """The registered controls: what a method has to beat."""
    return tuple(slug for slug in methods() if method_class(slug).fidelity == "control")


def plans(specs: Iterable[str], budgets: Budgets, with_controls: bool = True, with_ideal: bool = True) -> list[Plan]:
    """The cells of a run, references first.

    Raises:
        SpecError, BudgetError: a spec that does not parse, or has no budget when none is given.
    """
    found = [Plan(DENSE, "dense")]
    if with_ideal:
        found += [Plan(f"{IDEAL}:{budget}", "ideal", None, budget) for budget in budgets]
    known = controls()
    wanted = dict.fromkeys([*(known if with_controls else ()), *specs])
    for spec in wanted:
        if all(method.budget is not None or not method.wants_budget for method in parse(spec)):
            found.append(Plan(spec, "method", spec))
            continue
        kind: Kind = "control" if spec in known else "method"
        for budget in budgets:
            for method in parse(spec, budget):
                method.stages()
            found.append(Plan(f"{spec}:{budget}", kind, spec, budget))
    return found


def bench(
    subject: Subject,
    cells: Sequence[Plan],
    settings: Settings,
    path: Path | None = None,
    progress: Progress = lambda name, cell: None,
) -> Result:
    """Fill every cell that the file at `path` does not hold yet.

    Args:
        progress: called with a cell's name before it runs (None) and after (the cell).

    Returns:
        The content of the result file; its format is described in docs/results-format.md.

    Raises:
        InputError: the file holds another run.
    """
    result = opened(subject, settings, path)
    for plan in cells:
        if plan.name in result["cells"]:
            continue
        progress(plan.name, None)
        cell = _cell(subject, settings, plan)
        result["cells"][plan.name] = cell
        complete(result)
        if path is not None:
            write(result, path)
        progress(plan.name, cell)
    return complete(result)


def opened(subject: Subject, settings: Settings, path: Path | None) -> Result:
    """An empty result, or the one at `path` if it holds the same run.

    Raises:
        InputError: it holds another one.
    """
    model = subject.adapter.model
    run: Run = {
        "model": subject.name,
        **subject.about,
        "positions": settings.positions,
        "batches": list(settings.batches),
        "runs": settings.runs,
        "warmup": settings.warmup,
        "new_tokens": settings.new_tokens,
        "memory": settings.memory,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": names.attention_of(subject.adapter.text_config),
    }
    here = environment(subject.adapter.device)
    result: Result = {"schema": SCHEMA, "run": run, "environment": here, "cells": {}}
    if path is None or not path.exists():
        return result
    stored = read(path)
    theirs: dict[str, object] = {**stored.get("run", {}), "device": stored.get("environment", {}).get("device")}
    ours: dict[str, object] = {**run, "device": here["device"]}
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        key = differing[0]
        raise InputError(
            f"{str(path)!r} holds another run: {key} is {theirs.get(key)!r} there and {ours.get(key)!r} here. "
            "Choose another --out, or --fresh to start it anew."
        )
    return stored


def failures(result: Result) -> dict[str, str]:
    """Cells, and decisions alone, in which a method broke (as opposed to being refused), with the reason."""
    alone = {f"selection of {name}": row for name, row in result.get("selection", {}).items()}
    return {name: reason_of(cell) for name, cell in {**alone, **result["cells"]}.items() if state_of(cell) == "failed"}


def _cell(subject: Subject, settings: Settings, plan: Plan) -> Cell:
    about: Cell = {"kind": plan.kind, "method": plan.spec or plan.kind, "budget": plan.budget}
    try:
        return {**about, **_measured(subject, settings, plan)}
    except VTCError as error:
        return {**about, "refused": str(error)}
    except Exception as error:  # a broken method must not cost the other cells; the command's exit code tells
        traceback.print_exc()
        notes = "; ".join(getattr(error, "__notes__", ()))
        return {**about, "failed": f"{type(error).__name__}: {error}" + (f" ({notes})" if notes else "")}


def _measured(subject: Subject, settings: Settings, plan: Plan) -> Cell:
    """Answers first, then times."""
    prepared, cell = subject.prepared, Cell()
    kept = _kept(subject, plan) if plan.kind == "ideal" else None
    if plan.spec is None:
        cell |= _prompt_costs(subject, kept)
        if prepared is not None and plan.kind == "dense":
            cell |= score(prepared.suite, prepared.answers())
    else:
        with _patching(subject, settings, plan)() as handle:
            cell |= {"spec": handle.spec, "positions": handle.positions}
            if prepared is not None:
                answers = prepared.answers(handle)
                cell |= {**costs(answers.reports), **score(prepared.suite, answers)}
            else:
                cell |= costs([_one_report(subject, handle)])
    if settings.batches:
        cell["latency"] = [_latency(subject, settings, plan, kept, batch) for batch in settings.batches]
    return cell


def _latency(subject: Subject, settings: Settings, plan: Plan, kept: int | None, batch: int) -> Latency:
    """Times of one cell at one batch size, taken in turns with the dense model; FLOPs and bytes per sample."""
    adapter, inputs = subject.adapter, subject.inputs(batch)

    def generate(**options: Any) -> Tensor:
        ids: Tensor = adapter.model.generate(**inputs, **options)
        return ids

    dense = Variant(generate, nullcontext)
    if plan.spec is not None:
        variant = Variant(generate, _patching(subject, settings, plan))
    else:
        variant = dense if kept is None else ideal(adapter, inputs, kept)

    def first_token() -> Tensor:
        with torch.inference_mode():
            return variant.generate(max_new_tokens=1, do_sample=False)

    with variant.patched() as handle:
        with observed_encoder(adapter) as encoder:
            first_token()
        after = costs([handle.report]) if handle is not None else _costs_of(adapter, [inputs], kept)
        peak = _peak_bytes(first_token, adapter.device) if settings.memory else None
    variants = {"this": variant} if variant is dense else {"dense": dense, "this": variant}
    found = measure(adapter, variants, runs=settings.runs, warmup=settings.warmup, new_tokens=settings.new_tokens)
    own, reference = found["this"], found.get("dense", found["this"])
    return {
        "batch": batch,
        "phases": _rounded(own),
        "samples": {name: [round(value, 3) for value in values] for name, values in own.samples.items()},
        "dense_ttft_ms": _rounded(reference)["ttft_ms"],
        "flops": {"tower": encoder.tower // batch, "projector": encoder.projector // batch, "llm": after["flops"]},
        "kv_bytes": after["kv_bytes"],
        "peak_bytes": peak,
    }


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call allocates at most beyond what is there; None on a CPU, where PyTorch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _patching(subject: Subject, settings: Settings, plan: Plan) -> Callable[[], AbstractContextManager[Handle]]:
    assert plan.spec is not None
    spec, budget = plan.spec, plan.budget
    return lambda: compress(subject.adapter.model, spec, budget, positions=settings.positions)


def _one_report(subject: Subject, handle: Handle) -> Report:
    with torch.inference_mode():
        subject.adapter.model.generate(**subject.inputs(1), max_new_tokens=1, do_sample=False)
    return handle.report


def _kept(subject: Subject, plan: Plan) -> int:
    """Visual tokens of a timed prompt that a method of this budget leaves."""
    assert plan.budget is not None
    with compress(subject.adapter.model, "uniform", plan.budget, positions="original") as handle:
        return _one_report(subject, handle).entering[0]


def _prompt_costs(subject: Subject, kept: int | None) -> Cell:
    batches = [subject.inputs(1)] if subject.prepared is None else subject.prepared.batches
    return _costs_of(subject.adapter, batches, kept)


def _costs_of(adapter: Adapter, batches: Sequence[Mapping[str, Tensor]], kept: int | None) -> Cell:
    """What `accuracy.costs` says of a report, for prompts of which `kept` visual tokens (None: all) enter."""
    placeholders = torch.tensor([encoder.placeholder_id for encoder in adapter.encoders])
    size = next(adapter.language_model.parameters()).element_size()
    config, layers = adapter.text_config, len(adapter.layers)
    totals = [0.0] * 6
    samples = 0
    for inputs in batches:
        ids = inputs["input_ids"].cpu()
        before = tuple(torch.isin(ids, placeholders).sum(1).tolist())
        after = tuple(n if kept is None else min(kept, n) for n in before)
        text = tuple(ids.shape[1] - n for n in before)
        for n, k, other in zip(before, after, text, strict=True):
            full, short = ([m + other] * layers for m in (n, k))
            prefills = (flops.llm_prefill(config, lengths) for lengths in (short, full))
            caches = (flops.kv_bytes(config, lengths, size) for lengths in (short, full))
            for i, value in enumerate((n, k, *prefills, *caches)):
                totals[i] += value
        samples += len(before)
    before_mean, after_mean, short_flops, full_flops, short_bytes, full_bytes = (total / samples for total in totals)
    entering = round(after_mean, 2)
    return {
        "tokens": {
            "before": round(before_mean, 2),
            "entering_llm": entering,
            "after_last_cut": entering,
            "layer_average": entering,
        },
        "flops": round(short_flops),
        "flops_dense": round(full_flops),
        "kv_bytes": round(short_bytes),
        "kv_bytes_dense": round(full_bytes),
        "notes": [],
    }


def _rounded(phases: Phases) -> dict[str, Quantiles]:
    return {name: timing.to_dict() for name, timing in phases.summaries().items()}
