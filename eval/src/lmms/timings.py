"""Summaries of the records of `vtc.eval.lmms.watch.Watch`, kept as one list per field."""

import statistics
from collections.abc import Sequence
from typing import Any

from vtc.eval.results.timing import summary

#: milliseconds of single requests, reported with their quantiles
TIMES = ("ttft_ms", "tpot_ms", "selection_ms")
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


def times(parts: Sequence[Columns]) -> dict[str, dict[str, float]]:
    """Median and 20 % and 80 % quantiles of each time over all parts, without the first requests of each."""
    found = {}
    for name in TIMES:
        values = [v for part in parts for v in _measured(part, name, WARMUP)]
        values = values or [v for part in parts for v in _measured(part, name, 0)]
        if values:
            found[name] = {key: round(value, 3) for key, value in vars(summary(values)).items()}
    return found


def counts(parts: Sequence[Columns]) -> dict[str, Any]:
    """Tokens in the three conventions, prefill FLOPs and KV bytes, as means over the requests of all parts."""
    mean = {
        name: statistics.fmean(values)
        for name in (*TOKENS, *COSTS)
        if (values := [v for part in parts for v in _measured(part, name, 0)])
    }
    if not mean:
        return {}
    return {"tokens": {name: round(mean[name], 2) for name in TOKENS}} | {name: round(mean[name]) for name in COSTS}


def flat(part: Columns) -> dict[str, float]:
    """One number per field, for lmms-eval's throughput table: medians of times, means of counts."""
    found = counts([part])
    return {name: time["median"] for name, time in times([part]).items()} | found.pop("tokens", {}) | found


def _measured(part: Columns, name: str, skip: int) -> list[float | int]:
    return [value for value in part.get(name, [])[skip:] if value is not None]


def _rounded(value: float | int | None) -> float | int | None:
    return None if value is None else round(value, 3)
