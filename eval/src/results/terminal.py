"""Results as tables for the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vtc.eval.results.file import (
    REFERENCE,
    Cell,
    Latency,
    Result,
    budget_of,
    latency_of,
    method_of,
    reason_of,
    run_of,
    state_of,
)

#: columns of a table that has place for all of them
EVERYTHING = 260
_PHASES = ("encoder_ms", "projector_ms", "selection_ms", "prefill_ms")
_COLUMNS = (
    "method",
    "tokens",
    "accuracy",
    "against dense",
    "against random",
    "as dense",
    *(name.removesuffix("_ms") for name in _PHASES),
    "first token, ms",
    "gain",
    "ms/token",
    "encoder share",
    "KV MiB",
    "peak MiB",
    "GFLOPs",
)
#: left out first where a terminal is narrow
_LESS_IMPORTANT = (
    "projector",
    "encoder share",
    "encoder",
    "prefill",
    "ms/token",
    "GFLOPs",
    "peak MiB",
    "KV MiB",
    "against random",
    "selection",
    "as dense",
    "against dense",
    "gain",
)


def summary(cell: Cell) -> str:
    """A finished cell in a few words."""
    if state_of(cell) != "done":
        return f"{state_of(cell)}: {reason_of(cell)}"
    parts = []
    if "accuracy" in cell:
        parts.append(f"{cell['accuracy']['overall']['accuracy']:.1%} right")
    for entry in cell.get("latency", ()):
        parts.append(f"first token {entry['phases']['ttft_ms']['median']:.1f} ms at batch {entry['batch']}")
    return ", ".join(parts) or "done"


def console() -> Console:
    """A console for tables; where the output is no terminal, it is as wide as every column needs."""
    return Console() if sys.stdout.isatty() else Console(width=EVERYTHING)


def show(result: Result, console: Console) -> None:
    """One row per cell, one section per budget; a second table for methods that did not run."""
    run, cells = run_of(result), result["cells"]
    done = {name: cell for name, cell in cells.items() if state_of(cell) == "done"}
    batches: list[int | None] = [*run.get("batches", [])]
    for batch in batches or [None]:
        title = f"{run['model']}" + (f", batch {batch}" if batch is not None else "")
        console.print(_cells_table(result, done, batch, title, console.width))
    if any("against" in cell for cell in done.values()):
        console.print("against: difference in percentage points, and p-value of the exact McNemar test", soft_wrap=True)
    if any("latency" in cell for cell in done.values()):
        console.print(
            "gain: time to first token of the dense model over this one, and its share of the gain that FLOPs predict",
            soft_wrap=True,
        )
        console.print(
            "FLOPs: 2 x multiply-accumulates; a decoder layer on n tokens takes 4nD(H+G)d + 4nnHd + 6nDI "
            "(width D, H heads and G key heads of d, gated MLP of I); vtc.flops, vtc.eval.bench.costs have the rest",
            soft_wrap=True,
        )
    idle = Table("not run", "why", title="Methods that did not run on this model")
    for method, reason in _idle(cells).items():
        idle.add_row(method, reason)
    if idle.row_count:
        console.print(idle)


def _cells_table(result: Result, done: dict[str, Cell], batch: int | None, title: str, width: int) -> Table:
    selected = result.get("selection") or {}
    sizes = list(selected.get(REFERENCE, ()))
    rows = {
        name: _row(name, cell, batch) | {f"alone, N={n}": _alone(selected, method_of(name, cell), n) for n in sizes}
        for name, cell in sorted(done.items(), key=lambda item: _order(*item))
    }
    # what every row leaves empty, and what the terminal has no place for, is not shown
    columns = [column for column in _COLUMNS if any(row.get(column) for row in rows.values())]
    columns += [f"alone, N={n}" for n in sizes]
    widths = {c: max(len(c), *(len(row.get(c, "")) for row in rows.values())) + 3 for c in columns}
    for column in _LESS_IMPORTANT:
        if sum(widths.values()) + 1 > width:
            widths.pop(column, None)
    table = Table(*(column for column in columns if column in widths), title=title)
    last = None
    for name, row in rows.items():
        budget = budget_of(name, done[name])
        if last is not None and budget != last:
            table.add_section()
        table.add_row(*(row.get(column, "") for column in columns if column in widths))
        last = budget
    return table


def _row(name: str, cell: Cell, batch: int | None) -> dict[str, str]:
    row = {"method": f"{method_of(name, cell)} {budget_of(name, cell)}".strip(), **_accuracy_columns(cell)}
    entry = latency_of(cell, batch) if batch is not None else None
    return row if entry is None else row | _latency_columns(entry)


def _order(name: str, cell: Cell) -> tuple[float, int, float]:
    """Dense first, then by budget; in each the floor, the controls, then methods, best first."""
    budget = budget_of(name, cell)
    rank = {"dense": 0, "ideal": 1, "control": 2}.get(cell.get("kind", "method"), 3)
    right = cell["accuracy"]["overall"]["accuracy"] if "accuracy" in cell else 0.0
    return (-float("inf") if not budget else -float(budget)), rank, -right


def _accuracy_columns(cell: Cell) -> dict[str, str]:
    found = {}
    tokens = cell.get("tokens")
    if tokens is not None:
        entering, mean = tokens["entering_llm"], tokens["layer_average"]
        found["tokens"] = f"{entering:g}" if entering == mean else f"{entering:g}, mean {mean:g}"
    if "accuracy" in cell:
        whole = cell["accuracy"]["overall"]
        low, high = whole["wilson95"]
        found["accuracy"] = f"{whole['accuracy']:.1%} ({100 * low:.0f}-{100 * high:.0f})"
    for reference, test in cell.get("against", {}).items():
        found[f"against {reference}"] = f"{100 * test['difference']:+.1f}, p={test['p']:.2g}"
    if "agreement_with_dense" in cell:
        found["as dense"] = f"{cell['agreement_with_dense']:.0%}"
    return found


def _latency_columns(entry: Latency) -> dict[str, str]:
    times = entry["phases"]
    found = {name.removesuffix("_ms"): f"{times[name]['median']:.2f}" for name in _PHASES if name in times}
    first = times["ttft_ms"]
    found["first token, ms"] = f"{first['median']:.1f} ({first['p20']:.1f}-{first['p80']:.1f})"
    if "speed_up" in entry:
        found["gain"] = f"{entry['speed_up']:.2f}x, {entry['realised']:.0%}"
    if "decode_ms_per_token" in times:
        found["ms/token"] = f"{times['decode_ms_per_token']['median']:.2f}"
    found["encoder share"] = f"{entry['encoder_share']:.0%}"
    found["KV MiB"] = f"{entry['kv_bytes'] / 2**20:.2f}"
    found["GFLOPs"] = f"{sum(entry['flops'].values()) / 1e9:.3g}"
    peak = entry.get("peak_bytes")
    if peak is not None:
        found["peak MiB"] = f"{peak / 2**20:.1f}"
    return found


def _alone(selected: dict[str, Any], method: str, size: str) -> str:
    found = selected.get(method, {}).get(size)
    return "" if found is None else f"{found['median']:.2f} ms, {found['share']:.2%}"


def _idle(cells: dict[str, Cell]) -> dict[str, str]:
    """Method -> why it did not run, one line for all budgets."""
    return {
        method_of(name, cell): f"{state_of(cell)}: {reason_of(cell)}"
        for name, cell in cells.items()
        if state_of(cell) != "done"
    }


def show_comparison(rows: Sequence[dict[str, Any]], first: str, second: str, console: Console) -> None:
    """The rows of `vtc.eval.results.compare.compare`."""
    columns = ("cell", "accuracy", "difference", "p", "first token ms", "difference", "per token ms", "difference")
    table = Table(*columns, title=f"{second} against {first}, 95 % intervals")
    for row in rows:
        table.add_row(
            row["cell"],
            _pair(row.get("accuracy"), 100, "%"),
            _difference(row.get("accuracy"), 100),
            _p_value(row.get("accuracy")),
            _pair(row.get("ttft_ms"), 1, ""),
            _difference(row.get("ttft_ms"), 1),
            _pair(row.get("decode_ms_per_token"), 1, ""),
            _difference(row.get("decode_ms_per_token"), 1),
        )
    console.print(table)


def _pair(found: dict[str, Any] | None, factor: float, unit: str) -> str:
    return "" if found is None else f"{factor * found['first']:.1f} -> {factor * found['second']:.1f}{unit}"


def _difference(found: dict[str, Any] | None, factor: float) -> str:
    if found is None:
        return ""
    low, high = factor * found["low"], factor * found["high"]
    return f"{factor * found['difference']:+.1f} ({low:+.1f} .. {high:+.1f})"


def _p_value(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['p']:.3g}" if found.get("p") is not None else "unpaired"
