"""`vtc tune`: the cheapest method and budget that keep the accuracy."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtc.cli import Json, app, print_json
from vtc.errors import unknown_name
from vtc.eval.cli._options import (
    COSTS,
    FULL,
    Attention,
    Budgets,
    Device,
    Dtype,
    Methods,
    Model,
    Out,
    Positions,
    budgets,
    refuse,
    specs,
    split,
)


@app.command("tune")
def tune_command(
    target: Annotated[
        str, typer.Option(help="What must hold, e.g. 'accuracy>=0.98' (relative to dense); several with commas.")
    ] = "accuracy>=0.98",
    minimize: Annotated[str, typer.Option(help=f"What is made small: {', '.join(COSTS)}.")] = "ttft",
    method: Methods = "all",
    budget: Budgets = None,
    per_category: Annotated[int, typer.Option(min=1, help="Drawn questions of each category.")] = FULL[1],
    data: Annotated[Path | None, typer.Option(help="Own questions, as for `vtc bench`.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    positions: Positions = "auto",
    run: Annotated[bool, typer.Option(help="Run cells that the result file lacks.")] = True,
    out: Out = Path("bench.json"),
    as_json: Json = False,
) -> None:
    """Choose method and budget: the cheapest that keeps the accuracy. Prints the line that applies it."""
    if minimize not in COSTS:
        raise unknown_name("cost", minimize, COSTS, "vtc tune --help")
    kept = budgets(budget or "192,128,64,32")
    refuse(
        () if method == "all" else split(method),
        positions=positions,
        dtype=dtype,
        attention=attention,
        model=model,
        device=device,
        reads={"file of questions": data, "result file": None if run else out},
        writes=out,
    )
    from vtc.eval.bench import tune
    from vtc.eval.results.file import read

    goal = tune.Goal.of(target, minimize)
    if run:
        from vtc.eval.bench.cells import Settings, plans
        from vtc.eval.bench.subject import with_questions
        from vtc.eval.cli._progress import bench_with_progress
        from vtc.eval.data import suites
        from vtc.loading import load

        cells = plans(specs(method), kept, with_controls=False, with_ideal=False)
        suite = suites.from_file_or_drawn(data, None, per_category, one_word=model is not None)
        subject = with_questions(load(model, device, dtype, attention), suite)
        result = bench_with_progress(subject, cells, Settings(positions=positions), out)
    else:
        result = read(out)
    choice = tune.choose(result, goal)
    if as_json:
        print_json(choice.to_dict())
        return
    console = Console()
    console.print(choice.summary(), highlight=False)
    console.print(choice.line, markup=False, highlight=False, soft_wrap=True)
