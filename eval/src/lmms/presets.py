"""Published tables as data: exact settings of a paper's runs and the numbers that it printed.

A preset is a TOML file in `eval/src/presets`:

    title, arxiv, method, model      what was measured; `method` may still be missing in the registry
    source                           where the numbers were read, and by whom they were printed
    convention                       what a budget counts there
    positions                        position policy of the published runs
    base, limit, model_args          optional, as for `vtc eval`
    [columns.NAME]                   task and metric of lmms-eval, and the `scale` from its value to the printed one
    [dense]                          printed numbers of the uncompressed model
    [[rows]]                         `label`, `spec`, and `published`: NAME -> printed number

A column without `task` is printed, and cannot be measured here: its `note` says why.
"""

import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from vtc.catalogue.registry import methods
from vtc.errors import SpecError, unknown_name
from vtc.eval.lmms.evaluate import Settings
from vtc.eval.results.file import DENSE, Cell, Result
from vtc.spec import format_spec, parse

FOLDER = Path(str(resources.files("vtc.eval"))) / "presets"


@dataclass(frozen=True)
class Column:
    """One benchmark of a table: `scale` times the sum of lmms-eval's `metrics` is the printed number."""

    task: str | None = None
    metrics: tuple[str, ...] = ()
    scale: float = 100.0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    spec: str
    published: dict[str, float]


@dataclass(frozen=True)
class Preset:
    """A published table; see the docstring of this module for the fields."""

    name: str
    title: str
    method: str
    model: str
    source: str
    convention: str
    columns: dict[str, Column]
    rows: tuple[Row, ...]
    dense: dict[str, float]
    arxiv: str | None = None
    positions: str = "auto"
    base: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    notes: str = ""

    @property
    def awaits(self) -> str | None:
        """The method that vtc does not have yet, or None if the preset can run."""
        return None if self.method in methods() else self.method

    @property
    def specs(self) -> tuple[str, ...]:
        """Spec strings of all rows.

        Raises:
            SpecError: the method does not exist yet.
        """
        if self.awaits is not None:
            raise SpecError(f"preset {self.name!r} awaits method {self.awaits!r}. `vtc methods` lists what there is.")
        return tuple(row.spec for row in self.rows)

    def settings(self, limit: int | None = None, model: str | None = None) -> Settings:
        """What to run; `model` may be a local copy of the checkpoint."""
        tasks = dict.fromkeys(column.task for column in self.columns.values() if column.task)
        return Settings(
            tuple(tasks), model or self.model, self.base, self.positions, limit, model_args=dict(self.model_args)
        )


def names() -> tuple[str, ...]:
    """All presets, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load(name: str) -> Preset:
    """The preset of a name or alias.

    Raises:
        SpecError: there is none, or its file is wrong; the message says where.
    """
    if name not in names():
        known = {alias: other for other in names() for alias in load(other).aliases}
        if name not in known:
            raise unknown_name("preset", name, [*names(), *known], "vtc eval --list-presets")
        name = known[name]
    return read(FOLDER / f"{name}.toml")


def read(path: Path) -> Preset:
    """The preset in a file.

    Raises:
        SpecError: unknown or missing fields, or a number in a column that is not declared.
    """
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        data["columns"] = {
            name: Column(**{**column, "metrics": tuple(column.get("metrics", ()))})
            for name, column in data["columns"].items()
        }
        data["rows"] = tuple(Row(**row) for row in data["rows"])
        preset = Preset(path.stem, **{**data, "aliases": tuple(data.get("aliases", ()))})
    except (KeyError, TypeError) as error:
        raise SpecError(f"preset file {path}: {error}. See the docstring of vtc.eval.lmms.presets.") from error
    for numbers in (preset.dense, *(row.published for row in preset.rows)):
        for name in numbers:
            if name not in preset.columns:
                raise SpecError(f"preset file {path}: number for {name!r}, which is no column.")
    for name, column in preset.columns.items():
        if bool(column.task) != bool(column.metrics) or not (column.task or column.note):
            raise SpecError(f"preset file {path}: column {name!r} needs task and metrics, or a note why it has none.")
    return preset


def measured(preset: Preset, result: Result, spec: str | None) -> dict[str, float]:
    """Column -> measured number in the units of the table, where the result file has it; None is the dense model."""
    cell = result["cells"].get(DENSE if spec is None else format_spec(parse(spec)), Cell())
    tasks, found = cell.get("tasks", {}), {}
    for name, column in preset.columns.items():
        if column.task not in tasks:
            continue
        scores = tasks[column.task]["scores"]
        # a group without a score of its own is the plain mean over its subtasks
        parts = [scores[column.task]] if column.task in scores else list(scores.values())
        values = [[part[metric] for part in parts if metric in part] for metric in column.metrics]
        if values and all(values):
            found[name] = column.scale * sum(statistics.fmean(value) for value in values)
    return found


def comparison(preset: Preset, result: Result) -> list[tuple[str, str, dict[str, str]]]:
    """Rows of (label, "published" | "measured" | "difference", column -> text), two decimals."""
    lines = []
    wanted: Sequence[tuple[str, str | None, dict[str, float]]] = [
        ("all tokens", None, preset.dense),
        *((row.label, row.spec, row.published) for row in preset.rows),
    ]
    for label, spec, printed in wanted:
        ours = measured(preset, result, spec)
        lines.append((label, "published", {name: f"{value:g}" for name, value in printed.items()}))
        lines.append((label, "measured", {name: f"{value:.2f}" for name, value in ours.items()}))
        both = {name: ours[name] - printed[name] for name in preset.columns if name in ours and name in printed}
        lines.append((label, "difference", {name: f"{value:+.2f}" for name, value in both.items()}))
    return lines
