"""The command line: what `vtc` knows (methods, signals, models), and the commands that the packages above it add.

Commands import what they need when they are called: `vtc --help` waits for neither torch nor transformers.
"""

import dataclasses
import importlib
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.catalogue.names import check_families
from vtc.errors import VTCError

#: modules whose import adds commands to `app`; named, not imported, so that the core does not depend on them
COMMAND_MODULES = tuple(f"vtc.eval.cli.{name}" for name in ("bench", "tune", "calibrate", "run", "doctor", "lmms"))

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
    """List every method: where it acts, what it does, how faithful it is; --json and --markdown add where it runs."""
    from vtc.catalogue import tables
    from vtc.catalogue.capabilities import describe
    from vtc.catalogue.registry import methods

    if as_markdown:
        typer.echo(tables.methods_page(), nl=False)
        return
    rows = [describe(slug, families=as_json) for slug in methods()]
    if as_json:
        print_json(rows)
        return
    table = Table("method", "sites", "what it does", "fidelity", "arXiv", title=f"{len(rows)} methods")
    for column in (0, 1, 3, 4):
        table.columns[column].no_wrap = True
    for row in rows:
        steps = " / ".join(row[step] for step in ("filter", "correlate", "compress") if row[step] != "none")
        table.add_row(row["method"], " ".join(row["sites"]), steps, row["fidelity"], row["arxiv"] or "")
    Console().print(table)


@app.command("signals")
def list_signals(as_json: Json = False, as_markdown: Markdown = False) -> None:
    """List what a stage may read beside the features: shapes, sites, and what each holds."""
    from vtc.catalogue.tables import signals_table
    from vtc.signals import SIGNALS

    if as_markdown:
        typer.echo(signals_table())
        return
    if as_json:
        print_json([{"signal": name, **dataclasses.asdict(kind)} for name, kind in SIGNALS.items()])
        return
    table = Table("signal", "shape", "sites", "what it is", title="Signals")
    for name, kind in SIGNALS.items():
        table.add_row(name, kind.shape, " ".join(kind.sites), kind.doc)
    Console().print(table)


@app.command("models")
def list_models(as_json: Json = False, as_markdown: Markdown = False) -> None:
    """List the model families that can be patched, and (--json, --markdown) what each can do."""
    from vtc.adapter import adapter_classes
    from vtc.catalogue import tables
    from vtc.catalogue.capabilities import capabilities

    if as_markdown:
        typer.echo(tables.models_table())
        return
    if as_json:
        print_json(capabilities())
        return
    table = Table("family", "config.model_type", "checkpoints", title="Model families")
    for cls in adapter_classes():
        table.add_row(cls.family, ", ".join(cls.model_types), "\n".join(cls.checkpoints))
    Console().print(table)


@app.command("oracle")
def oracle(
    family: Annotated[list[str] | None, typer.Argument(help="Families; none: all.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Largest relative difference that passes. None: that of the tests.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare compressed tiny models with the masked full model; exit code 1 where one differs by more than --limit."""
    check_families(family or ())
    from vtc.testing.oracle_table import LIMIT, worst_difference
    from vtc.testing.tiny import families

    limit = LIMIT if limit is None else limit
    rows = [worst_difference(name) for name in family or families()]
    passed = all(row.difference <= limit for row in rows)
    if as_json:
        worst = max(row.difference for row in rows)
        print_json({"limit": limit, "passed": passed, "worst": worst, "families": [row.to_dict() for row in rows]})
    else:
        table = Table(
            "family", "worst relative difference", "cases", "where", title=f"Masked full model, limit {limit:g}"
        )
        for row in rows:
            mark = "" if row.difference <= limit else " (too large)"
            table.add_row(row.family, f"{row.difference:.1e}{mark}", str(row.cases), row.case)
        Console().print(table)
    if not passed:
        raise typer.Exit(1)


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
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
