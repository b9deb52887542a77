"""`vtc eval`: benchmarks of lmms-eval with methods at budgets, or a paper's table again."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.budget import Budget
from vtc.cli import Json, app, print_json
from vtc.errors import EvaluationError, SpecError
from vtc.eval.cli._options import Device, Model, Positions, budgets, refuse, split


@app.command("eval")
def eval_command(
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lmms-eval, separated by commas; 'lmms-eval tasks list' shows all.")
    ] = "vtc_scenes",
    method: Annotated[
        str, typer.Option("--methods", help="Spec strings, separated by semicolons or commas; 'all' for every method.")
    ] = "visionzip",
    budget: Annotated[
        str, typer.Option("--budgets", help="Token counts or shares, separated by commas, for specs without their own.")
    ] = "64",
    model: Model = None,
    preset: Annotated[
        str | None, typer.Option(help="A published table: its model, tasks, methods and budgets, and its numbers.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Result file; finished tasks in it are not run again.")] = Path("eval.json"),
    device: Device = None,
    positions: Positions = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="First questions of each task. None: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once, where lmms-eval's class can.")] = 1,
    lmms_model: Annotated[
        str | None, typer.Option(help="lmms-eval's model id, such as llava_hf. None: the one for the model's type.")
    ] = None,
    simple: Annotated[
        bool, typer.Option("--simple", help="lmms-eval's simple class instead of the chat class.")
    ] = False,
    model_args: Annotated[
        str, typer.Option(help="Further arguments of lmms-eval's class: name=value, separated by commas.")
    ] = "",
    include_path: Annotated[list[Path] | None, typer.Option(help="A folder with further task files.")] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="After a failure go on with the next method; still exits non-zero.")
    ] = False,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and exit.")] = False,
    tasks_path: Annotated[
        bool, typer.Option("--tasks-path", help="Print the folder of our task files, for lmms_eval --include_path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Scores of lmms-eval for methods at budgets beside the dense model, with times and tokens."""
    if tasks_path:
        from vtc.eval.lmms.evaluate import TASKS

        typer.echo(TASKS)
        return
    if list_presets:
        from vtc.eval.cli._shown import show_presets

        show_presets()
        return
    budgets(budget)
    arguments = _arguments(model_args)
    ours = preset is None and method.strip() != "all"
    refuse(split(method, ",;") if ours else (), positions=positions, model=model, device=device, writes=out)
    from vtc.eval.cli._progress import errors
    from vtc.eval.cli._shown import show_preset, show_scores
    from vtc.eval.lmms import presets
    from vtc.eval.lmms.evaluate import Settings, sweep

    table = None if preset is None else presets.load(preset)
    if table is not None:
        specs, settings = list(table.specs), table.settings(limit, model)
    else:
        specs = _specs(method, budget)
        wanted = tuple(name.strip() for name in tasks.split(","))
        settings = Settings(wanted, model, lmms_model, positions, limit, batch_size, simple, arguments)
    with _traceback():
        result = sweep(
            settings,
            specs,
            device=device,
            include=include_path or (),
            path=out,
            keep_going=keep_going,
            progress=lambda line: errors().print(line, highlight=False, markup=False),
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result)
    elif table is not None:
        show_preset(table, result)
    else:
        show_scores(result)
    failed = {name: cell["failed"] for name, cell in result["cells"].items() if "failed" in cell}
    if failed:
        raise EvaluationError("; ".join(f"{name} failed on {reason}" for name, reason in failed.items()))


@contextmanager
def _traceback() -> Iterator[None]:
    """Print what a failed run was raised from."""
    try:
        yield
    except EvaluationError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        raise


def _specs(methods_text: str, budgets: str) -> list[str]:
    from vtc.catalogue.registry import methods
    from vtc.spec import format_spec, parse

    written = methods() if methods_text.strip() == "all" else split(methods_text, ",;")
    found: dict[str, None] = {}
    for text in written:
        needs = any(part.budget is None for part in parse(text))
        for value in budgets.split(",") if needs else [None]:
            found[format_spec(parse(text, None if value is None else Budget.of(value.strip())))] = None
    if not found:
        raise SpecError("no method given. Write for example --methods visionzip,fastv or --methods all.")
    return list(found)


def _arguments(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in split(text):
        name, sign, value = item.partition("=")
        if not sign:
            raise SpecError(f"model argument {item!r} is not of the form name=value.")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    for convert in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return convert(text.lower())
        except (ValueError, KeyError):
            continue
    return text
