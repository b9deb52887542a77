"""What a person sees on standard error while cells are measured."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtc.eval.bench.cells import Plan, Settings, bench
from vtc.eval.bench.subject import Subject
from vtc.eval.results import terminal
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
