"""`vtc bench` with `compare`, `plot` and `report`."""

from pathlib import Path
from typing import Annotated

import typer

from vtc.cli import Json, Markdown, app, print_json
from vtc.errors import InputError, unknown_name
from vtc.eval.cli._options import (
    ARCHITECTURES,
    FULL,
    QUICK,
    Attention,
    Budgets,
    Device,
    Dtype,
    Methods,
    Model,
    Out,
    Positions,
    Questions,
    budgets,
    refuse,
    specs,
    split,
)

bench_app = typer.Typer(
    invoke_without_command=True, help="Measure methods at token budgets; compare, plot and report what was measured."
)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench_command(
    context: typer.Context,
    method: Methods = "all",
    budget: Budgets = None,
    per_category: Annotated[int | None, typer.Option(min=1, help="Drawn questions of each category.")] = None,
    data: Questions = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of --data.")] = None,
    model: Model = None,
    arch: Annotated[
        str | None,
        typer.Option(help=f"Random weights, times only: {', '.join(ARCHITECTURES)}. Small on a CPU."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    positions: Positions = "auto",
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
    if arch is not None and arch not in ARCHITECTURES:
        raise unknown_name("architecture", arch, ARCHITECTURES, "vtc bench --help")
    default_budgets, default_questions, default_runs = QUICK if quick else FULL
    kept, sizes = budgets(budget or default_budgets), _batches(batches)
    refuse(
        () if method == "all" else split(method),
        positions=positions,
        dtype=dtype,
        attention=attention,
        model=model,
        device=device,
        reads={"file of questions": data},
        writes=out,
    )
    from vtc.eval.bench import decisions
    from vtc.eval.bench.cells import Settings, failures, plans
    from vtc.eval.bench.subject import with_questions
    from vtc.eval.cli._progress import bench_with_progress, draw_plots, errors, random_weights
    from vtc.eval.data import suites
    from vtc.eval.results import page, plots, terminal
    from vtc.loading import load

    if plot:
        plots.check()
    cells = plans(specs(method), kept, with_controls=with_controls, with_ideal=latency)
    settings = Settings(
        positions=positions,
        batches=sizes if latency else (),
        runs=repeats or default_runs,
        new_tokens=new_tokens,
        memory=memory,
    )
    if arch is not None:
        measured = random_weights(arch, device, dtype, attention)
    else:
        questions = suites.from_file_or_drawn(
            data, limit, per_category or default_questions, seed, one_word=model is not None
        )
        measured = with_questions(load(model, device, dtype, attention), questions, ask=accuracy)
    if fresh:
        out.unlink(missing_ok=True)
    result = bench_with_progress(measured, cells, settings, out)
    if with_selection:
        decisions.add(result, specs(method), measured.adapter.device, out, errors().print)
    if plot or quick:
        draw_plots(result, out, optional=not plot)
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
    from vtc.eval.results import compare, terminal
    from vtc.eval.results.file import read

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
    from vtc.eval.results import plots
    from vtc.eval.results.file import read

    for path in plots.draw(read(result), result):
        typer.echo(str(path))


@bench_app.command("report")
def report_command(
    results: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path | None, typer.Option(help="Where the page is written. None: standard output.")] = None,
) -> None:
    """Write the Markdown page of result files; docs/results.md is made this way."""
    from vtc.eval.results import page

    text = page.page(results)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batches={text!r}: write batch sizes such as 1,4,16.")
    return tuple(dict.fromkeys(sizes))
