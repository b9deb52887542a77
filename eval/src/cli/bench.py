"""Commands that measure: `vtc bench` with `compare`, `plot` and `report`, and `vtc tune`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtc.adapter import adapter_for
from vtc.cli import Json, Markdown, print_json
from vtc.errors import InputError, MissingExtraError
from vtc.eval.bench import architectures, decisions, tune
from vtc.eval.bench.accuracy import Prepared
from vtc.eval.bench.cells import Plan, Settings, Subject, bench, failures, image_methods, plans
from vtc.eval.data import suites
from vtc.eval.loading import load
from vtc.eval.results import compare, page, plots, terminal
from vtc.eval.results.file import Cell, Result, read
from vtc.tokens import Budget

bench_app = typer.Typer(
    invoke_without_command=True, help="Measure methods at token budgets; compare, plot and report what was measured."
)

Methods = Annotated[
    str, typer.Option("--methods", help="Spec strings, separated by commas; 'all' for every image method.")
]
Budgets = Annotated[str | None, typer.Option("--budgets", help="Token counts or shares, separated by commas.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub id. None: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Attention = Annotated[str | None, typer.Option(help="eager, sdpa or flash_attention_2.")]
Out = Annotated[Path, typer.Option(help="Result file; finished cells in it are not run again.")]

#: what --quick sets where nothing else is said: budgets, questions per category, timed runs
QUICK = ("64", 5, 3)
FULL = ("64", 25, 5)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the `vtc` command."""
    app.add_typer(bench_app, name="bench")
    app.command("tune")(tune_command)


@bench_app.callback()
def bench_command(
    context: typer.Context,
    method: Methods = "all",
    budget: Budgets = None,
    per_category: Annotated[int | None, typer.Option(min=1, help="Drawn questions of each category.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Own questions: JSON lines with image, question, answer, category.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of --data.")] = None,
    model: Model = None,
    arch: Annotated[
        str | None,
        typer.Option(help=f"Random weights, times only: {', '.join(architectures.archs())}. Small on a CPU."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    positions: Annotated[str, typer.Option(help="Position ids: original, compact or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the drawn questions.")] = 0,
    batches: Annotated[str, typer.Option(help="Batch sizes to be timed, e.g. 1,4,16.")] = "1",
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls of each cell.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Timed tokens behind the first one.")] = 8,
    accuracy: Annotated[bool, typer.Option(help="Ask the questions.")] = True,
    latency: Annotated[bool, typer.Option(help="Measure times.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    with_controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Also run the controls.")] = True,
    with_selection: Annotated[
        bool, typer.Option("--selection", help="Also time each method's decision alone at N=576 and N=2880.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One budget, few questions, few calls, with plots.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the result file holds.")] = False,
    plot: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the plots beside the result file.")] = False,
    out: Out = Path("bench.json"),
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Accuracy, time and memory of methods at token budgets, beside the dense model, the ideal and the controls."""
    if context.invoked_subcommand is not None:
        return
    if arch is not None and (model is not None or data is not None):
        raise InputError("--arch has random weights: it goes with neither --model nor --data.")
    default_budgets, default_questions, default_runs = QUICK if quick else FULL
    cells = plans(
        specs(method),
        budgets(budget or default_budgets),
        with_controls=with_controls,
        with_ideal=latency,
    )
    settings = Settings(
        positions=positions,
        batches=_batches(batches) if latency else (),
        runs=repeats or default_runs,
        new_tokens=new_tokens,
        memory=memory,
    )
    subject = (
        _loaded(model, device, dtype, attention, data, limit, per_category or default_questions, seed, accuracy)
        if arch is None
        else _random(arch, device, dtype, attention)
    )
    if plot:
        plots.check()  # before anything runs
    if fresh:
        out.unlink(missing_ok=True)
    result = run_with_progress(subject, cells, settings, out)
    if with_selection:
        decisions.add(result, specs(method), subject.adapter.device, out, _console().print)
    if plot or quick:
        _draw(result, out, optional=not plot)
    if as_json:
        print_json(result)
    elif as_markdown:
        typer.echo(page.markdown(result))
    else:
        terminal.show(result, terminal.console())
    if failures(result):
        raise SystemExit(1)


@bench_app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(help="A result file.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Json = False,
) -> None:
    """Differences of the second result to the first, cell by cell, with 95 % intervals."""
    rows = compare.compare(read(first), read(second))
    if as_json:
        print_json(rows)
        return
    terminal.show_comparison(rows, first.name, second.name, terminal.console())


@bench_app.command("plot")
def plot_command(
    result: Annotated[Path, typer.Argument(help="A result file.")],
) -> None:
    """Draw accuracy against tokens and against time to first token: PNG, and HTML to explore."""
    for path in plots.draw(read(result), result):
        typer.echo(str(path))


@bench_app.command("report")
def report_command(
    results: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path | None, typer.Option(help="Where the page is written. None: standard output.")] = None,
) -> None:
    """Write the Markdown page of result files; docs/results.md is made this way."""
    text = page.page(results)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


def tune_command(
    target: Annotated[
        str, typer.Option(help="What must hold, e.g. 'accuracy>=0.98' (relative to dense); several with commas.")
    ] = "accuracy>=0.98",
    minimize: Annotated[str, typer.Option(help=f"What is made small: {', '.join(tune.COSTS)}.")] = "ttft",
    method: Methods = "all",
    budget: Budgets = None,
    per_category: Annotated[int, typer.Option(min=1, help="Drawn questions of each category.")] = FULL[1],
    data: Annotated[Path | None, typer.Option(help="Own questions, as for `vtc bench`.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    positions: Annotated[str, typer.Option(help="Position ids: original, compact or auto.")] = "auto",
    run: Annotated[bool, typer.Option(help="Run cells that the result file lacks.")] = True,
    out: Out = Path("bench.json"),
    as_json: Json = False,
) -> None:
    """Choose method and budget: the cheapest that keeps the accuracy. Prints the line that applies it."""
    goal = tune.Goal.of(target, minimize)
    if run:
        cells = plans(specs(method), budgets(budget or "192,128,64,32"), with_controls=False, with_ideal=False)
        subject = _loaded(model, device, dtype, attention, data, None, per_category, 0, True)
        result = run_with_progress(subject, cells, Settings(positions=positions), out)
    else:
        result = read(out)
    choice = tune.choose(result, goal)
    if as_json:
        print_json(choice.to_dict())
        return
    console = Console()
    console.print(choice.summary(), highlight=False)
    console.print(choice.line, markup=False, highlight=False, soft_wrap=True)


def run_with_progress(subject: Subject, cells: Sequence[Plan], settings: Settings, out: Path) -> Result:
    """`bench` with a bar on standard error and a line for each finished cell."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as bar:
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


def _draw(result: Result, out: Path, optional: bool) -> None:
    """Plots beside the result file; `optional`: say so where they cannot be drawn, instead of failing."""
    try:
        lines = [f"written: {path}" for path in plots.draw(result, out)]
    except (MissingExtraError, InputError) as error:
        if not optional:
            raise
        lines = [f"no plots: {error}"]
    for line in lines:
        _console().print(line, markup=False, highlight=False, soft_wrap=True)


def specs(text: str) -> list[str]:
    """Spec strings of a comma-separated list; commas inside parentheses belong to a spec."""
    if text == "all":
        return list(image_methods())
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def budgets(text: str) -> list[int | float]:
    """Token counts and shares of a comma-separated list.

    Raises:
        BudgetError: one of them is no budget.
    """
    found = [Budget.of(part) for part in text.split(",")]
    return [value for budget in found if (value := budget.tokens if budget.tokens is not None else budget.ratio)]


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batches={text!r}: write batch sizes such as 1,4,16.")
    return tuple(dict.fromkeys(sizes))


def _loaded(
    model: str | None,
    device: str | None,
    dtype: str,
    attention: str | None,
    data: Path | None,
    limit: int | None,
    per_category: int,
    seed: int,
    accuracy: bool,
) -> Subject:
    loaded = load(model, device, dtype, attention)
    if data is not None:
        suite = suites.from_file(data, limit)
    else:
        suite = suites.scenes(per_category, seed, one_word=model is not None)
    first = suite.items[0]

    def inputs(batch: int) -> dict[str, Any]:
        return loaded.batch([first.image] * batch, [first.question] * batch)

    prepared = Prepared(loaded, suite, batch_size=8) if accuracy else None
    about = {"suite": suite.about if accuracy else None}
    return Subject(loaded.name, adapter_for(loaded.model), inputs, prepared, about)


def _random(arch: str, device: str | None, dtype: str, attention: str | None) -> Subject:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    built = architectures.build(arch, device, dtype, attention)
    about = built.about()
    if built.is_small:
        _console().print(
            f"[bold]{arch} scaled down for the CPU[/]: {about['parameters'] / 1e6:.0f} million parameters "
            f"({about['decoder']['layers']} layers of width {about['decoder']['width']}), as many visual tokens.",
            highlight=False,
        )
    return Subject(arch, adapter_for(built.model), built.inputs, None, {"suite": None, "arch": about})


def _console() -> Console:
    return Console(stderr=True)
