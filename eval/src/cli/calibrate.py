"""`vtc calibrate`: what a method measures once per model, as a file."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtc.cli import Json, app, print_json
from vtc.errors import unknown_name
from vtc.eval.cli._options import CALIBRATIONS, Device, Dtype, Model, Questions, refuse


@app.command("calibrate")
def calibrate_command(
    method: Annotated[str, typer.Argument(help=f"What to calibrate: {', '.join(CALIBRATIONS)}.")],
    out: Annotated[Path, typer.Option(help="Where to write what was found, as JSON.")],
    model: Model = None,
    data: Questions = None,
    per_category: Annotated[
        int, typer.Option(min=1, help="Drawn questions of each of the eight categories, without --data.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the drawn questions.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one forward.")] = 8,
    keep: Annotated[int | None, typer.Option(min=1, help="dymu: tokens of an image that stay on average.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure what a method needs to know about a model, on validation scenes or your own questions."""
    if method not in CALIBRATIONS:
        raise unknown_name("method with a calibration", method, CALIBRATIONS, "vtc calibrate --help")
    refuse(dtype=dtype, model=model, device=device, reads={"file of questions": data}, writes=out)
    from vtc.eval.data import suites
    from vtc.eval.probe.calibrate import calibrate
    from vtc.loading import load

    # no test scenes: what is chosen here is measured on those
    suite = suites.scenes(per_category, seed, split="val") if data is None else suites.from_file(data)
    found = calibrate(method, load(model, device, dtype), suite, batch_size, keep)
    found.write(out)
    if as_json:
        print_json(asdict(found))
        return
    console = Console()
    for part in (found.options, found.measured):
        for name, value in part.items():
            console.print(f"{name}: {value}", soft_wrap=True, highlight=False)
    console.print(f"written to {out}")
