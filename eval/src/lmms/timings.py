"""Summaries of the records of `vtc.eval.lmms.watch.Watch`, kept as one list per field."""

import statistics
from collections.abc import Sequence
from typing import Any

from vtc.eval.results.file import Cell, Time
from vtc.eval.results.timing import Quantiles, summary

#: milliseconds of single requests, reported with their quantiles
TIMES: tuple[Time, ...] = ("ttft_ms", "tpot_ms", "selection_ms")
#: counts of single requests, reported as means
TOKENS = ("before", "entering_llm", "after_last_cut", "layer_average")
COSTS = ("flops", "flops_dense", "kv_bytes", "kv_bytes_dense")
#: requests of each task that warm up caches and kernels, and are left out of times
WARMUP = 1

Columns = dict[str, list[float | int | None]]


def columns(records: Sequence[dict[str, Any]]) -> Columns:
    """Records as lists of the same length; None where a field was not measured."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [_rounded(record.get(name)) for record in records] for name in names}


def times(parts: Sequence[Columns]) -> dict[Time, Quantiles]:
    """Median and 20 % and 80 % quantiles of each time over all parts, without the first requests of each."""
    found: dict[Time, Quantiles] = {}
    for name in TIMES:
        values = [v for part in parts for v in _measured(part, name, WARMUP)]
        values = values or [v for part in parts for v in _measured(part, name, 0)]
        if values:
            found[name] = summary(values).to_dict()
    return found


def counts(parts: Sequence[Columns]) -> Cell:
    """Tokens in the three conventions, prefill FLOPs and KV bytes, as means over the requests of all parts."""
    mean = {
        name: statistics.fmean(values)
        for name in (*TOKENS, *COSTS)
        if (values := [v for part in parts for v in _measured(part, name, 0)])
    }
    if not mean:
        return {}
    return {
        "tokens": {
            "before": round(mean["before"], 2),
            "entering_llm": round(mean["entering_llm"], 2),
            "after_last_cut": round(mean["after_last_cut"], 2),
            "layer_average": round(mean["layer_average"], 2),
        },
        "flops": round(mean["flops"]),
        "flops_dense": round(mean["flops_dense"]),
        "kv_bytes": round(mean["kv_bytes"]),
        "kv_bytes_dense": round(mean["kv_bytes_dense"]),
    }


def flat(part: Columns) -> dict[str, float]:
    """One number per field, for lmms-eval's throughput table: medians of times, means of counts."""
    found: dict[str, Any] = {**counts([part])}
    medians = {name: time["median"] for name, time in times([part]).items()}
    return {**medians, **found.pop("tokens", {}), **found}


def _measured(part: Columns, name: str, skip: int) -> list[float | int]:
    return [value for value in part.get(name, [])[skip:] if value is not None]


def _rounded(value: float | int | None) -> float | int | None:
    return None if value is None else round(value, 3)
