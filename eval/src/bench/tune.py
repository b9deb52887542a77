"""Choose a method and a budget from measured cells: the cheapest one that keeps what must be kept."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vtc.errors import InputError, unknown_name
from vtc.eval.results.file import DENSE, Cell, Latency, Result, Tokens, latency_of, run_of, state_of

Read = Callable[[Cell, Cell, int], float | None]


def _phase(name: str) -> Read:
    def read(cell: Cell, dense: Cell, batch: int) -> float | None:
        entry = latency_of(cell, batch)
        return None if entry is None or name not in entry["phases"] else float(entry["phases"][name]["median"])

    return read


def _timed(of: Callable[[Latency], float | None]) -> Read:
    def read(cell: Cell, dense: Cell, batch: int) -> float | None:
        entry = latency_of(cell, batch)
        found = None if entry is None else of(entry)
        return None if found is None else float(found)

    return read


def _tokens(of: Callable[[Tokens], float]) -> Read:
    return lambda cell, dense, batch: of(cell["tokens"]) if "tokens" in cell else None


def _relative_accuracy(cell: Cell, dense: Cell, batch: int) -> float | None:
    if "accuracy" not in cell or "accuracy" not in dense:
        return None
    return float(cell["accuracy"]["overall"]["accuracy"] / dense["accuracy"]["overall"]["accuracy"])


def _share_right(cell: Cell, dense: Cell, batch: int) -> float | None:
    return float(cell["accuracy"]["overall"]["accuracy"]) if "accuracy" in cell else None


def _lower_bound(cell: Cell, dense: Cell, batch: int) -> float | None:
    """The lower end of the paired 95 % interval, on the scale of `accuracy`."""
    against = cell.get("against", {}).get(DENSE)
    if against is None:
        return None
    return 1.0 + float(against["low"]) / float(dense["accuracy"]["overall"]["accuracy"])


#: what can be made small
COSTS: Mapping[str, Read] = {
    "ttft": _timed(lambda entry: entry.get("ttft_ms")),
    "decode": _phase("decode_ms_per_token"),
    "selection": _phase("selection_ms"),
    "prefill": _phase("prefill_ms"),
    "memory": _timed(lambda entry: entry["peak_bytes"]),
    "kv": lambda cell, dense, batch: cell.get("kv_bytes"),
    "flops": lambda cell, dense, batch: cell.get("flops"),
    "tokens": _tokens(lambda tokens: tokens["entering_llm"]),
    "average_tokens": _tokens(lambda tokens: tokens["layer_average"]),
}
#: what can be asked for; "accuracy" and "accuracy_low" are relative to the dense model
METRICS: Mapping[str, Read] = {
    "accuracy": _relative_accuracy,
    "accuracy_low": _lower_bound,
    "absolute_accuracy": _share_right,
    "agreement": lambda cell, dense, batch: cell.get("agreement_with_dense"),
    "speed_up": _timed(lambda entry: entry.get("speed_up")),
    **COSTS,
}
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
_CONDITION = re.compile(r"^\s*([a-z_]+)\s*(>=|<=)\s*([0-9.eE+-]+)\s*(%?)\s*$")


@dataclass(frozen=True)
class Condition:
    """One thing that must hold, such as accuracy >= 0.98."""

    metric: str
    sign: str
    value: float

    @classmethod
    def of(cls, text: str) -> "Condition":
        """Read "accuracy>=0.98" or "accuracy>=98%".

        Raises:
            InputError: it does not read like that.
            SpecError: no such metric.
        """
        match = _CONDITION.match(text)
        try:
            value = float(match[3]) / (100 if match[4] else 1) if match else None
        except ValueError:
            value = None
        if match is None or value is None:
            raise InputError(f"target {text!r}: write metric>=number or metric<=number, e.g. 'accuracy>=0.98'.")
        if match[1] not in METRICS:
            raise unknown_name("metric", match[1], METRICS, "vtc tune --help")
        return cls(match[1], match[2], value)

    def holds(self, cell: Cell, dense: Cell, batch: int) -> bool:
        """Whether a cell satisfies it; a cell without the number does not."""
        found = METRICS[self.metric](cell, dense, batch)
        return found is not None and _SIGNS[self.sign](found, self.value)

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.value:g}"


@dataclass(frozen=True)
class Goal:
    """What must hold and what is made small."""

    conditions: tuple[Condition, ...]
    cost: str

    @classmethod
    def of(cls, target: str, minimize: str) -> "Goal":
        """Read the options of `vtc tune`.

        Raises:
            InputError, SpecError: a condition or a cost that does not exist.
        """
        if minimize not in COSTS:
            raise unknown_name("cost", minimize, COSTS, "vtc tune --help")
        return cls(tuple(Condition.of(part) for part in target.split(",")), minimize)


@dataclass(frozen=True)
class Choice:
    """The cell that was chosen.

    Args:
        name: of the cell.
        spec: of the patch, budget included.
        positions: position policy of the run.
        metrics: every metric that the cell has.
        cost, dense_cost: what was made small, here and for the dense model.
        candidates: how many cells satisfied the target.
    """

    name: str
    spec: str
    positions: str
    metrics: dict[str, float]
    goal: Goal
    dense_cost: float | None
    candidates: int

    @property
    def line(self) -> str:
        """The line that applies it."""
        other = "" if self.positions == "auto" else f', positions="{self.positions}"'
        return f'handle = vtc.patch(model, "{self.spec}"{other})'

    def summary(self) -> str:
        """Why this one, in one sentence."""
        cost = self.goal.cost
        dense = "" if self.dense_cost is None else f" (dense: {self.dense_cost:.4g})"
        held = ", ".join(
            f"{condition} holds with {self.metrics[condition.metric]:.3f}" for condition in self.goal.conditions
        )
        return (
            f"{self.name}: {cost} {self.metrics[cost]:.4g}{dense}, the smallest of {self.candidates} cells for which "
            f"{held}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "cell": self.name,
            "spec": self.spec,
            "positions": self.positions,
            "line": self.line,
            "metrics": self.metrics,
            "target": [str(condition) for condition in self.goal.conditions],
            "minimize": self.goal.cost,
            "dense_cost": self.dense_cost,
            "candidates": self.candidates,
        }


def choose(result: Result, goal: Goal) -> Choice:
    """The cell with the smallest cost among those that satisfy the goal; the dense model is none of them.

    Raises:
        InputError: nothing satisfies it (the message says what comes nearest), or the result lacks the numbers.
    """
    run, cells = run_of(result), result["cells"]
    batch = min(run.get("batches") or [1])
    dense = cells.get(DENSE)
    if dense is None:
        raise InputError("the result has no dense cell, so nothing is relative to anything. Run `vtc bench` first.")
    ran = {
        name: cell
        for name, cell in cells.items()
        if state_of(cell) == "done" and cell.get("kind", "method") in ("method", "control") and name != DENSE
    }
    priced = {name: price for name, cell in ran.items() if (price := COSTS[goal.cost](cell, dense, batch)) is not None}
    if not priced:
        raise InputError(f"no cell of this result has {goal.cost!r}. Run `vtc bench` with times for these methods.")
    fit = {name: c for name, c in priced.items() if all(t.holds(cells[name], dense, batch) for t in goal.conditions)}
    if not fit:
        raise InputError(_nearest(goal, {name: ran[name] for name in priced}, dense, batch))
    name = min(fit, key=lambda name: (fit[name], name))
    cell = cells[name]
    metrics = {
        metric: round(float(value), 6)
        for metric, read in METRICS.items()
        if (value := read(cell, dense, batch)) is not None
    }
    return Choice(
        name, cell.get("spec", name), run.get("positions", "auto"), metrics, goal,
        COSTS[goal.cost](dense, dense, batch), len(fit),
    )  # fmt: skip


def _nearest(goal: Goal, cells: Mapping[str, Cell], dense: Cell, batch: int) -> str:
    """What comes nearest to the first condition that keeps all cells out."""
    parts = []
    for condition in goal.conditions:
        read = METRICS[condition.metric]
        known = {name: v for name, cell in cells.items() if (v := read(cell, dense, batch)) is not None}
        if not known:
            parts.append(f"no cell has {condition.metric!r}")
            continue
        best = max if condition.sign == ">=" else min
        name = best(known, key=lambda name: known[name])
        parts.append(f"for {condition}, {name} comes nearest with {known[name]:.4g}")
    return (
        f"none of {len(cells)} cells satisfies {', '.join(map(str, goal.conditions))}: {'; '.join(parts)}. "
        "Relax the target, or measure larger budgets with --budgets."
    )
