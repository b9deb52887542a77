"""The command line: `vtc methods`, `vtc models`, and the commands that the packages above the core add."""

import importlib
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtc.adapter import adapter_classes
from vtc.errors import VTCError
from vtc.registry import describe, methods
from vtc.tables import methods_table, models_table

#: modules whose import adds commands to `app`; named, not imported, so that the core does not depend on them
COMMAND_MODULES = ("vtc.eval.cli",)

app = typer.Typer(
    name="vtc",
    help="Training-free visual-token compression for vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the Markdown table of the documentation.")]


@app.command("methods")
def list_methods(as_json: Json = False, as_markdown: Markdown = False) -> None:
    """List every method: where it acts, what it reads, how faithful it is."""
    if as_markdown:
        typer.echo(methods_table())
        return
    rows = [describe(slug) for slug in methods()]
    if as_json:
        print_json(rows)
        return
    table = Table("method", "sites", "what it does", "fidelity", "arXiv", title="Methods")
    for column in (0, 1, 3, 4):
        table.columns[column].no_wrap = True
    for row in rows:
        steps = " / ".join(row[step] for step in ("filter", "correlate", "compress") if row[step] != "none")
        table.add_row(row["method"], " ".join(row["sites"]), steps, row["fidelity"], row["arxiv"] or "")
    Console().print(table)


@app.command("models")
def list_models(as_json: Json = False, as_markdown: Markdown = False) -> None:
    """List the model families that can be patched."""
    if as_markdown:
        typer.echo(models_table())
        return
    rows: list[dict[str, Any]] = [
        {"family": cls.family, "model_types": list(cls.model_types), "checkpoints": list(cls.checkpoints)}
        for cls in adapter_classes()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("family", "config.model_type", "checkpoints", title="Model families")
    for row in rows:
        table.add_row(row["family"], ", ".join(row["model_types"]), "\n".join(row["checkpoints"]))
    Console().print(table)


def print_json(data: Any) -> None:
    """Write `data` as JSON to standard output, and nothing else."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def main() -> None:
    """Entry point of the `vtc` command; errors raised on purpose become one line and exit code 2."""
    for name in COMMAND_MODULES:
        importlib.import_module(name)
    try:
        app()
    except VTCError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
