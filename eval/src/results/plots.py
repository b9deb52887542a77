"""Accuracy against tokens and against time to first token: PNG pictures, and one HTML page to explore.

The Pareto front joins the cells that no other one beats in both directions. Only its cells, the dense model and the
controls are named in the pictures; in the HTML page every point says what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.results.file import DENSE, RANDOM, Cell, Result, budget_of, latency_of, method_of, run_of, state_of
from vtc.eval.results.page import title
from vtc.extras import require

#: name of the plot -> label of its horizontal axis
AXES = {"tokens": "visual tokens in the LLM, average over its layers", "ttft": "time to first token, ms (median)"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY, DARK, FRONT, REFERENCE = "#b8bec6", "#3c4650", "#0b6e99", "#c4512d"
#: offsets at which a label is tried, in points, nearest first
OFFSETS = tuple(
    (x * reach, y * reach)
    for reach in (9, 16, 26, 40, 58)
    for x, y in ((0.7, -1), (0.7, 0.7), (-0.7, 0.7), (-0.7, -1), (0, 1), (0, -1.3), (1.4, 0), (-1.4, 0))
)


@dataclass(frozen=True)
class Point:
    """One cell in one plot."""

    method: str
    budget: str
    kind: str
    x: float
    y: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """Method and budget."""
        return f"{self.method} {self.budget}".strip()


#: where a name stands, the name, its colour
Label = tuple[Point, str, str]


def draw(result: Result, out: Path) -> list[Path]:
    """Write `<out>-tokens.png`, `<out>-ttft.png` (where it was timed) and `<out>.html` beside the result file.

    Raises:
        MissingExtraError: matplotlib or plotly is not installed.
        InputError: the result holds no accuracy, so there is nothing to draw.
    """
    check()
    plots = {name: found for name in AXES if (found := points(result, name))}
    if not plots:
        raise InputError("the result holds no cell with an accuracy, so there is nothing to draw.")
    written = []
    for name, found in plots.items():
        path = out.with_name(f"{out.stem}-{name}.png")
        picture(result, name, found, path)
        written.append(path)
    page = out.with_suffix(".html")
    explorer(result, plots, page)
    return [*written, page]


def check() -> None:
    """Raise MissingExtraError if plots cannot be drawn here."""
    for package in ("matplotlib", "plotly"):
        require(package)


def points(result: Result, axis: str) -> list[Point]:
    """The cells with an accuracy and a place on the axis."""
    batch = min(run_of(result).get("batches") or [1])
    found = []
    for name, cell in result["cells"].items():
        x = _place(cell, axis, batch)
        if state_of(cell) == "done" and "accuracy" in cell and x is not None:
            whole = cell["accuracy"]["overall"]
            low, high = (100 * bound for bound in whole["wilson95"])
            kind = cell.get("kind", DENSE if name == DENSE else "method")
            method, budget = method_of(name, cell), budget_of(name, cell)
            found.append(Point(method, budget, kind, x, 100 * whole["accuracy"], low, high))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The compressed cells for which no other is at least as accurate and as cheap, from cheap to dear."""
    best: list[Point] = []
    for point in sorted((p for p in found if p.kind != DENSE), key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def picture(result: Result, axis: str, found: Sequence[Point], path: Path) -> None:
    """One PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    budgets = list(dict.fromkeys(point.budget for point in found if point.kind != DENSE))
    markers = {budget: MARKERS[i % len(MARKERS)] for i, budget in enumerate(budgets)}
    labels = [*_methods(axes, found, markers), *_controls(axes, found), *_dense(axes, found, axis)]
    _ideals(result, axis, axes)
    _scales(axes, axis)
    axes.set_title(
        f"{title(result)}: Pareto front of {len({p.method for p in found if p.kind != DENSE})} methods",
        loc="left", fontsize=11, pad=24,
    )  # fmt: skip
    _legend(axes, markers)
    _place_labels(figure, axes, labels, found)
    figure.savefig(path)


def _methods(axes: Any, found: Sequence[Point], markers: Mapping[str, str]) -> list[Label]:
    """Every compressed cell, and the front through the best of them; the labels of the best."""
    best = front(found)
    for point in found:
        if point.kind != DENSE:
            chosen = point in best
            axes.scatter(
                point.x,
                point.y,
                marker=markers[point.budget],
                s=62 if chosen else 26,
                zorder=4 if chosen else 2,
                color=FRONT if chosen else _colour(point),
                edgecolor="white",
                linewidth=0.6,
            )
    axes.plot([p.x for p in best], [p.y for p in best], color=FRONT, linewidth=1.4, zorder=3)
    for point in best:
        axes.plot([point.x] * 2, [point.low, point.high], color=FRONT, linewidth=0.8, alpha=0.35, zorder=1)
    return [(point, point.label, FRONT) for point in best]


def _controls(axes: Any, found: Sequence[Point]) -> list[Label]:
    """A line through the cells of each control, named at its last cell that is not on the front."""
    best, labels = front(found), []
    for method in dict.fromkeys(p.method for p in found if p.kind == "control"):
        line = [p for p in found if p.method == method]
        style = "--" if method == RANDOM else ":"
        axes.plot([p.x for p in line], [p.y for p in line], style, linewidth=1.2, color=_colour(line[0]), zorder=2)
        named = [p for p in line if p not in best]
        labels += [(named[-1], method, _colour(line[0]))] if named else []
    return labels


def _dense(axes: Any, found: Sequence[Point], axis: str) -> list[Label]:
    labels = []
    for point in found:
        if point.kind == DENSE:
            axes.axhline(point.y, color=DARK, linewidth=0.8, linestyle=(0, (6, 4)), zorder=0)
            axes.scatter(point.x, point.y, marker="*", s=190, color=DARK, zorder=5)
            labels.append((point, f"dense, {point.x:.0f}" + (" tokens" if axis == "tokens" else " ms"), DARK))
    return labels


def _scales(axes: Any, axis: str) -> None:
    axes.margins(x=0.08, y=0.09)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("right answers, %")
    if axis == "tokens":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.grid(color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Any, markers: Mapping[str, str]) -> None:
    for budget, marker in markers.items():
        axes.scatter([], [], marker=marker, color=GREY, label=f"budget {budget}" if budget else "own budget")
    axes.plot([], [], color=FRONT, marker="o", linewidth=1.4, label="Pareto front, 95 % intervals")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(markers) + 1, frameon=False, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _colour(point: Point) -> str:
    if point.kind != "control":
        return GREY
    return REFERENCE if point.method == RANDOM else DARK


def _ideals(result: Result, axis: str, axes: Any) -> None:
    """Where the floor lies: the time of the model fed only so many tokens."""
    if axis != "ttft":
        return
    batch = min(run_of(result).get("batches") or [1])
    transform = axes.get_xaxis_transform()
    for name, cell in result["cells"].items():
        x = _place(cell, axis, batch)
        if cell.get("kind") == "ideal" and x is not None:
            axes.axvline(x, color=DARK, linewidth=0.7, linestyle=":", alpha=0.6, zorder=0)
            axes.text(
                x, 0.01, f"floor, {budget_of(name, cell)} tokens ", transform=transform, rotation=90, fontsize=7,
                color=DARK, ha="right", va="bottom", alpha=0.8,
            )  # fmt: skip


def _place_labels(figure: Any, axes: Any, labels: Sequence[Label], found: Sequence[Point]) -> None:
    """Put each label at the first offset at which it covers neither a point nor another label."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    figure.canvas.draw()
    figure.set_layout_engine("none")  # labels must not move the axes any more
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent()
    taken = [_box(axes.transData.transform((p.x, p.y)).tolist(), 5.0) for p in found]
    best = [axes.transData.transform((p.x, p.y)) for p in front(found)]
    for (x0, y0), (x1, y1) in pairwise(best):  # labels stay off the front's line too
        taken += [_box((x0 + (x1 - x0) * i / 60, y0 + (y1 - y0) * i / 60), 1.0) for i in range(61)]
    taken += [
        (frame.x0, y - 1, frame.x1, y + 1)
        for y in (axes.transData.transform((p.x, p.y))[1] for p in found if p.kind == DENSE)
    ]
    words: list[Box] = []
    for point, text, colour in labels:
        choices: list[tuple[int, int, Any, Box]] = []
        for dx, dy in OFFSETS:
            note = axes.annotate(
                text, (point.x, point.y), xytext=(dx, dy), textcoords="offset points", fontsize=8.5, color=colour,
                ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center", zorder=6,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
            )  # fmt: skip
            note.update_positions(renderer)
            extent = Text.get_window_extent(note, renderer)  # of the words, without the line that leads to them
            box = (extent.x0 - 2, extent.y0 - 1, extent.x1 + 2, extent.y1 + 1)
            inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
            overlap = sum(_covers(box, other) for other in taken) + (0 if inside else 1000)
            overlap += 100 * sum(_covers(box, other) for other in words)
            choices.append((overlap, len(choices), note, box))
            if not overlap:
                break
        chosen = min(choices, key=lambda choice: choice[:2])
        for choice in choices:
            if choice is not chosen:
                choice[2].remove()
        words.append(chosen[3])


Box = tuple[float, float, float, float]


def _box(centre: Sequence[float], radius: float) -> Box:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _covers(a: Box, b: Box) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def explorer(result: Result, plots: dict[str, list[Point]], path: Path) -> None:
    """One HTML page that needs no network: both plots, one legend entry per method, what each point is on hovering."""
    from plotly.colors import qualitative
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(plots), horizontal_spacing=0.07)
    methods = list(dict.fromkeys(point.method for found in plots.values() for point in found))
    palette = qualitative.Dark24
    for column, (axis, found) in enumerate(plots.items(), 1):
        best = front(found)
        figure.add_trace(
            Scatter(
                x=[p.x for p in best], y=[p.y for p in best], mode="lines", name="Pareto front", hoverinfo="skip",
                line={"color": FRONT, "width": 5}, opacity=0.3, legendgroup="front", showlegend=column == 1,
            ),
            1, column,
        )  # fmt: skip
        for number, method in enumerate(methods):
            line = sorted((p for p in found if p.method == method), key=lambda p: p.x)
            if not line:
                continue
            is_control = line[0].kind in ("control", DENSE)
            figure.add_trace(
                Scatter(
                    x=[p.x for p in line], y=[p.y for p in line], name=method, legendgroup=method,
                    mode="lines+markers", showlegend=column == 1,
                    line={"color": DARK if is_control else palette[number % len(palette)], "width": 1,
                          "dash": "dash" if is_control else "solid"},
                    marker={"size": 14 if line[0].kind == DENSE else 8,
                            "symbol": "star" if line[0].kind == DENSE else "circle"},
                    error_y={"type": "data", "symmetric": False, "thickness": 0.6, "width": 0,
                             "array": [p.high - p.y for p in line], "arrayminus": [p.y - p.low for p in line]},
                    text=[p.label for p in line],
                    hovertemplate="<b>%{text}</b><br>%{y:.1f} % right<br>%{x:.4g}<extra></extra>",
                ),
                1, column,
            )  # fmt: skip
        figure.update_xaxes(title_text=AXES[axis], type="log" if axis == "tokens" else "linear", row=1, col=column)
    figure.update_yaxes(title_text="right answers, %", row=1, col=1)
    figure.update_layout(title=title(result), template="plotly_white", height=720, hovermode="closest")
    figure.write_html(path, include_plotlyjs=True)


def _place(cell: Cell, axis: str, batch: int) -> float | None:
    if axis == "tokens":
        return float(cell["tokens"]["layer_average"]) if "tokens" in cell else None
    entry = latency_of(cell, batch)
    return float(entry["ttft_ms"]) if entry is not None else None
