"""Result files of `vtc bench`: reading, writing, and what follows from the cells (`docs/results-format.md`).

Everything that can be computed from other cells (paired tests, agreement, speed-ups) is computed here each time a file
is written, so a run that was killed and started again ends with the same numbers.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from vtc.errors import InputError
from vtc.eval.results.environment import Environment
from vtc.eval.results.intervals import Share
from vtc.eval.results.stats import Difference, loyalty, paired
from vtc.eval.results.timing import Quantiles

SCHEMA = 2
DENSE, IDEAL, RANDOM = "dense", "ideal", "random"
#: row of `selection` that the shares of the others refer to
REFERENCE = "dense prefill"

Kind = Literal["dense", "ideal", "control", "method"]
#: times of single requests in a cell of `vtc eval`
Time = Literal["ttft_ms", "tpot_ms", "selection_ms"]


class Tokens(TypedDict):
    """Visual tokens per sample, mean."""

    before: float
    entering_llm: float
    after_last_cut: float
    layer_average: float


class Latency(TypedDict):
    """The times of a cell at one batch size."""

    batch: int
    phases: dict[str, Quantiles]
    samples: dict[str, list[float]]
    dense_ttft_ms: Quantiles
    flops: dict[str, int]
    kv_bytes: int
    peak_bytes: int | None
    ttft_ms: NotRequired[float]
    encoder_share: NotRequired[float]
    speed_up: NotRequired[float]
    predicted_speed_up: NotRequired[float]
    realised: NotRequired[float]


class Task(TypedDict):
    """What `vtc eval` notes of one task."""

    scores: dict[str, dict[str, float]]
    samples: dict[str, dict[str, Any]]
    requests: dict[str, list[float | int | None]]
    seconds: float


class Cell(TypedDict, total=False):
    """One method at one budget; what is known depends on what was measured."""

    kind: Kind
    method: str
    budget: int | float | str | None
    spec: str
    positions: str
    refused: str
    failed: str
    tokens: Tokens
    flops: int
    flops_dense: int
    kv_bytes: int
    kv_bytes_dense: int
    notes: list[str]
    accuracy: dict[str, Share]
    correct: str
    answers: list[str]
    seconds: float
    against: dict[str, Difference]
    agreement_with_dense: float
    agreement_wilson95: list[float]
    latency: list[Latency]
    tasks: dict[str, Task]
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    selection_ms: Quantiles


class Run(TypedDict, total=False):
    """What was run; the last three are of schema 1."""

    model: str
    suite: dict[str, Any] | None
    arch: dict[str, Any]
    positions: str
    batches: list[int]
    runs: int
    warmup: int
    new_tokens: int
    memory: bool
    dtype: str
    attention: str | None
    base: str | None
    batch_size: int
    simple: bool
    model_args: dict[str, Any]
    split: str
    per_category: int
    seed: int


class Result(TypedDict):
    """A result file; `selection` is method -> tokens -> time of its decision alone."""

    schema: int
    run: Run
    environment: Environment
    cells: dict[str, Cell]
    selection: NotRequired[dict[str, dict[str, Any]]]
    suite: NotRequired[Run]


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
    return cast(Result, result)


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


def run_of(result: Result) -> Run:
    """What was run: model, suite, settings (schema 1 called it `suite`)."""
    return result.get("run") or result["suite"]


def method_of(name: str, cell: Cell) -> str:
    """The spec of a cell without its budget."""
    return str(cell.get("method") or name.rpartition(":")[0] or name)


def budget_of(name: str, cell: Cell) -> str:
    """The budget of a cell as text; empty for the dense model."""
    if "budget" in cell:
        return "" if cell["budget"] is None else str(cell["budget"])
    return name.rpartition(":")[2] if name != DENSE else ""


def state_of(cell: Mapping[str, object]) -> str:
    """ "done", "refused" or "failed"."""
    return next((word for word in ("refused", "failed") if word in cell), "done")


def reason_of(cell: Mapping[str, object]) -> str:
    """Why a cell is refused or failed."""
    return str(cell[state_of(cell)])


def latency_of(cell: Cell, batch: int = 1) -> Latency | None:
    """The timing of a cell at a batch size."""
    return next((entry for entry in cell.get("latency", ()) if entry["batch"] == batch), None)


def complete(result: Result) -> Result:
    """`fill_in` for the cells of a result."""
    fill_in(result["cells"])
    return result


def fill_in(cells: Mapping[str, Cell]) -> None:
    """Write into cells what follows from them: comparisons with dense and random, agreement, speed-ups."""
    dense = cells.get(DENSE, Cell())
    for name, cell in cells.items():
        if name == DENSE or state_of(cell) != "done":
            continue
        references = {DENSE: dense, RANDOM: cells.get(f"{RANDOM}:{budget_of(name, cell)}", Cell())}
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


def _speed_ups(entry: Latency, dense: Latency) -> None:
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
