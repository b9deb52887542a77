"""What changed between two result files: differences with their 95 % intervals, cell by cell."""

from collections.abc import Mapping
from typing import Any

from vtc.errors import InputError
from vtc.eval.results.file import Cell, Result, latency_of, run_of, state_of
from vtc.eval.results.stats import median_difference, paired, unpaired

TIMES = ("ttft_ms", "decode_ms_per_token")


def compare(first: Result, second: Result) -> list[dict[str, Any]]:
    """One row for each cell that both results hold and that ran in both.

    Accuracies are compared question by question (exact McNemar test, bootstrap interval) where both asked the same
    questions and noted which answers were right, else as two independent shares (Newcombe interval, no p-value). Times
    are differences of medians with bootstrap intervals, at the smallest batch size that both timed.

    Raises:
        InputError: no cell in common.
    """
    shared = [name for name in first["cells"] if name in second["cells"]]
    if not shared:
        raise InputError(
            f"no cell in common: one result holds {', '.join(list(first['cells'])[:4])} ..., the other "
            f"{', '.join(list(second['cells'])[:4])} .... Run both with the same methods and budgets."
        )
    same_questions = _questions(first) == _questions(second)
    rows = []
    for name in shared:
        a, b = first["cells"][name], second["cells"][name]
        row: dict[str, Any] = {"cell": name}
        if state_of(a) == state_of(b) == "done":
            row |= _accuracies(a, b, same_questions) | _times(a, b)
        rows.append(row)
    return rows


def _questions(result: Result) -> Any:
    """What decides which questions were asked."""
    run: Mapping[str, Any] = run_of(result)
    if "suite" in run:
        return run["suite"]
    return {"name": "scenes", "one_word": False, **{key: run.get(key) for key in ("split", "per_category", "seed")}}


def _accuracies(a: Cell, b: Cell, same_questions: bool) -> dict[str, Any]:
    if "accuracy" not in a or "accuracy" not in b:
        return {}
    whole_a, whole_b = (cell["accuracy"]["overall"] for cell in (a, b))
    if same_questions and "correct" in a and "correct" in b:
        found = paired([int(bit) for bit in a["correct"]], [int(bit) for bit in b["correct"]])
    else:
        found = unpaired((whole_a["right"], whole_a["questions"]), (whole_b["right"], whole_b["questions"]))
    row = {"first": whole_a["accuracy"], "second": whole_b["accuracy"], **found.to_dict()}
    by_category = {}
    for category in a["accuracy"].keys() & b["accuracy"].keys() - {"overall"}:
        one, other = a["accuracy"][category], b["accuracy"][category]
        difference = unpaired((one["right"], one["questions"]), (other["right"], other["questions"]))
        by_category[category] = difference.to_dict()
    return {"accuracy": row, "categories": dict(sorted(by_category.items()))}


def _times(a: Cell, b: Cell) -> dict[str, Any]:
    batches = {entry["batch"] for entry in a.get("latency", ())} & {entry["batch"] for entry in b.get("latency", ())}
    if not batches:
        return {}
    found: dict[str, Any] = {"batch": min(batches)}
    first, second = (latency_of(cell, min(batches)) for cell in (a, b))
    assert first is not None
    assert second is not None
    for name in TIMES:
        if first["samples"].get(name) and second["samples"].get(name):
            difference, low, high = median_difference(first["samples"][name], second["samples"][name])
            found[name] = {
                "first": first["phases"][name]["median"], "second": second["phases"][name]["median"],
                "difference": round(difference, 3), "low": round(low, 3), "high": round(high, 3),
            }  # fmt: skip
    return found
