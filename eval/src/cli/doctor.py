"""`vtc doctor`: what vtc finds in a model, and whether it decodes rightly on the installed versions."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.cli import Json, app, print_json
from vtc.engine.host.contract import SWITCH, tested_range
from vtc.eval.probe.doctor import diagnose
from vtc.loading import embedded_path
from vtc.testing.self_check import self_check


@app.command("doctor")
def doctor_command(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; its config is enough. With --self-check: a family.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Compare compressed tiny models with the masked full model on the installed versions; exit code 1 "
            "where they differ.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what vtc finds in a model, which methods can run on it, and why the others cannot."""
    if check:
        _self_check(model, as_json)
        return
    found = diagnose(str(embedded_path()) if model is None else model)
    if as_json:
        print_json(found.to_dict())
        return
    console = Console()
    table = Table("part", "found", title=f"{found.model}: family {found.family}")
    for part, text in found.parts.items():
        table.add_row(part, text)
    console.print(table)
    console.print(f"[bold green]can run[/] {', '.join(found.runs)}")
    for method, reason in found.refused.items():
        console.print(f"[bold red]cannot run[/] [bold]{method}[/]: {reason}", highlight=False)


def _self_check(family: str | None, as_json: bool) -> None:
    found = self_check(family)
    if as_json:
        print_json(found.to_dict())
    else:
        console = Console()
        console.print(", ".join(f"{name} {version}" for name, version in found.versions.items()), highlight=False)
        table = Table("family", "case", "worst relative difference", title=f"Masked full model, limit {found.limit:g}")
        for one in found.worst():
            ok = one.difference <= found.limit
            mark = f"{one.difference:.1e}" + ("" if ok else f" (too large, {one.attention})")
            table.add_row(one.family, one.case, escape(one.error or mark), style=None if ok else "bold red")
        console.print(table)
        if not found.passed:
            console.print(
                "[bold red]failed[/]: on these versions answers of compressed models would be wrong. Install tested "
                f"ones (transformers{tested_range()}) and report this table."
            )
        elif not found.tested:
            console.print(
                f"[bold green]passed[/], on a transformers that was not tested for this release (tested: "
                f"{tested_range()}). To patch models on it, set {SWITCH}=1."
            )
        else:
            console.print("[bold green]passed[/]")
    if not found.passed:
        raise typer.Exit(1)
