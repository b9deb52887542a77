"""What a person sees on standard error while cells are measured: bars, notes, and where plots were written."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtc.errors import InputError, MissingExtraError
from vtc.eval.bench import architectures
from vtc.eval.bench.cells import Plan, Settings, bench
from vtc.eval.bench.subject import Subject, without_weights
from vtc.eval.results import plots, terminal
from vtc.eval.results.file import Cell, Result, read


def errors() -> Console:
    """The console of standard error, which leaves standard output to the result."""
    return Console(stderr=True)


def bench_with_progress(subject: Subject, cells: Sequence[Plan], settings: Settings, out: Path) -> Result:
    """`bench` with a bar on standard error and a line for each finished cell."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors()) as bar:
        task = bar.add_task("cells", total=len(cells))

        def progress(name: str, cell: Cell | None) -> None:
            if cell is None:
                bar.update(task, description=name)
                return
            bar.print(f"{name}: {terminal.summary(cell)}", highlight=False)
            bar.advance(task)

        stored = read(out)["cells"] if out.exists() else {}
        bar.advance(task, sum(plan.name in stored for plan in cells))
        result = bench(subject, cells, settings, out, progress)
        bar.update(task, description="done")
    return result


def draw_plots(result: Result, out: Path, optional: bool) -> None:
    """Plots beside the result file; `optional`: say so where they cannot be drawn, instead of failing."""
    try:
        lines = [f"written: {path}" for path in plots.draw(result, out)]
    except (MissingExtraError, InputError) as error:
        if not optional:
            raise
        lines = [f"no plots: {error}"]
    for line in lines:
        errors().print(line, markup=False, highlight=False, soft_wrap=True)


def random_weights(arch: str, device: str | None, dtype: str, attention: str | None) -> Subject:
    """An architecture with random weights; says so where it had to be scaled down."""
    built = architectures.build(arch, device, dtype, attention)
    if built.is_small:
        about = built.about()
        errors().print(
            f"[bold]{arch} scaled down for the CPU[/]: {about['parameters'] / 1e6:.0f} million parameters "
            f"({about['decoder']['layers']} layers of width {about['decoder']['width']}), as many visual tokens.",
            highlight=False,
        )
    return without_weights(built)
