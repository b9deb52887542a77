"""`vtc doctor`: what vtc finds in a model, and whether it decodes rightly on the installed versions."""

from typing import Annotated

import typer

from vtc.catalogue.names import check_families
from vtc.cli import Json, app, print_json
from vtc.settings import check_model


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
    check_model(model)
    from vtc.eval.cli._shown import show_diagnosis
    from vtc.eval.probe.doctor import diagnose
    from vtc.loading import embedded_path

    found = diagnose(str(embedded_path()) if model is None else model)
    if as_json:
        print_json(found.to_dict())
    else:
        show_diagnosis(found)


def _self_check(family: str | None, as_json: bool) -> None:
    check_families(() if family is None else (family,))
    from vtc.eval.cli._shown import show_self_check
    from vtc.testing.self_check import self_check

    found = self_check(family)
    if as_json:
        print_json(found.to_dict())
    else:
        show_self_check(found)
    if not found.passed:
        raise typer.Exit(1)
