"""Result files of `vtc bench`: reading, writing, and what follows from the cells (`docs/results-format.md`).

Everything that can be computed from other cells (paired tests, agreement, speed-ups) is computed here each time a file
is written, so a run that was killed and started again ends with the same numbers.
"""

import json
import os
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.results.stats import loyalty, paired

SCHEMA = 2
DENSE, IDEAL, RANDOM = "dense", "ideal", "random"
#: row of `selection` that the shares of the others refer to
REFERENCE = "dense prefill"

Result = dict[str, Any]
Cell = dict[str, Any]


def read(path: Path) -> Result:
    """The result file at `path`.

    Raises:
        InputError: there is none, or it is no result of `vtc bench` or `vtc eval`.
    """
    if not path.is_file():
        raise InputError(f"no result file at {str(path)!r}. `vtc bench --out {path}` writes one.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no JSON ({error}).") from error
    if not isinstance(result, dict) or not isinstance(result.get("cells"), dict):
        raise InputError(f"{str(path)!r} holds no cells, so it is no result of `vtc bench` or `vtc eval`.")
    return result


def write(result: Result, path: Path) -> None:
    """Write `result` in one step, one line per cell; a reader or a kill never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(dumps(result), encoding="utf-8")
    os.replace(part, path)


def dumps(result: Result) -> str:
    """JSON text with one line for each cell and each other entry."""
    entries = []
    for key, value in result.items():
        if isinstance(value, dict) and key in ("cells", "selection"):
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            entries.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        else:
            entries.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def run_of(result: Result) -> dict[str, Any]:
    """What was run: model, suite, settings (schema 1 called it `suite`)."""
    found: dict[str, Any] = result.get("run") or result["suite"]
    return found


def method_of(name: str, cell: Cell) -> str:
    """The spec of a cell without its budget."""
    return str(cell.get("method") or name.rpartition(":")[0] or name)


def budget_of(name: str, cell: Cell) -> str:
    """The budget of a cell as text; empty for the dense model."""
    if "budget" in cell:
        return "" if cell["budget"] is None else str(cell["budget"])
    return name.rpartition(":")[2] if name != DENSE else ""


def state_of(cell: Cell) -> str:
    """ "done", "refused" or "failed"."""
    return next((word for word in ("refused", "failed") if word in cell), "done")


def latency_of(cell: Cell, batch: int = 1) -> dict[str, Any] | None:
    """The timing of a cell at a batch size."""
    return next((entry for entry in cell.get("latency", ()) if entry["batch"] == batch), None)


def complete(result: Result) -> Result:
    """Fill in what follows from the cells, in place: comparisons with dense and random, agreement, speed-ups."""
    cells = result["cells"]
    dense = cells.get(DENSE, {})
    for name, cell in cells.items():
        if name == DENSE or state_of(cell) != "done":
            continue
        references = {DENSE: dense, RANDOM: cells.get(f"{RANDOM}:{budget_of(name, cell)}", {})}
        if "correct" in cell:
            cell["against"] = {
                reference: paired(_bits(other["correct"]), _bits(cell["correct"])).to_dict()
                for reference, other in references.items()
                if "correct" in other and other is not cell
            }
        if "answers" in cell and "answers" in dense:
            agreement = loyalty(cell["answers"], dense["answers"])
            cell["agreement_with_dense"], cell["agreement_wilson95"] = agreement["share"], agreement["wilson95"]
        for entry in cell.get("latency", ()):
            reference = latency_of(dense, entry["batch"])
            if reference is not None:
                _speed_ups(entry, reference)
    for cell in cells.values():
        for entry in cell.get("latency", ()):
            phases = entry["phases"]
            entry.setdefault("ttft_ms", phases["ttft_ms"]["median"])
            entry["encoder_share"] = round(phases["encoder_ms"]["median"] / phases["ttft_ms"]["median"], 4)
    return result


def _speed_ups(entry: dict[str, Any], dense: dict[str, Any]) -> None:
    """Measured and predicted gain in time to first token.

    The dense time is the one taken in turns with this cell, so a machine that was slow for a while does not show; with
    this gain and the time of the dense cell, `ttft_ms` puts all cells on one scale.
    """
    predicted = sum(dense["flops"].values()) / sum(entry["flops"].values())
    measured = entry["dense_ttft_ms"]["median"] / entry["phases"]["ttft_ms"]["median"]
    entry["speed_up"] = round(measured, 4)
    entry["ttft_ms"] = round(dense["phases"]["ttft_ms"]["median"] / measured, 3)
    entry["predicted_speed_up"] = round(predicted, 4)
    entry["realised"] = round(measured / predicted, 4)


def _bits(text: str) -> list[int]:
    return [int(character) for character in text]
