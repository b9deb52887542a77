"""`vtc run`: one image and one question, with all visual tokens and with a budget."""

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vtc.cli import Json, app, print_json
from vtc.eval.bench.prompt import RunResult, run
from vtc.eval.cli._options import Attention, Device, Dtype, Positions
from vtc.eval.scenes.draw import draw_scene, questions
from vtc.loading import load, open_image


@app.command("run")
def run_command(
    image: Annotated[Path | None, typer.Option(help="A photograph or drawing. None: a scene is drawn.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask. None: a question about the drawn scene.")] = None,
    method: Annotated[
        str, typer.Option(help="A method or a spec string such as 'fastervlm:128 + dart@2:64'; see `vtc methods`.")
    ] = "visionzip",
    budget: Annotated[
        str | None, typer.Option(help="Visual tokens that stay: 64, or a share such as 0.11 or 11%.")
    ] = "64",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a checkpoint. None: the embedded model.")
    ] = None,
    positions: Positions = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs for the time to first token.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of the drawn scene.")] = 0,
    overlay: Annotated[Path, typer.Option(help="Where to write the picture of the token map.")] = Path(
        "vtc-overlay.png"
    ),
    as_json: Json = False,
) -> None:
    """Ask a model about an image with all visual tokens and with a budget, and compare."""
    expected = None
    if image is None:
        scene = draw_scene(seed)
        picture = scene.image
        if question is None:
            chosen = random.Random(seed).choice(questions(scene, random.Random(seed)))
            question, expected = chosen.prompt, chosen.answer
    else:
        picture = open_image(image)
        question = question or "What is in the picture?"
    result = run(
        load(model, device, dtype, attention),
        picture,
        question,
        method,
        budget,
        positions=positions,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        picture=overlay,
        expected=expected,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: RunResult) -> None:
    report, console = result.report, Console()
    console.print(f"[bold]{result.question}[/]" + (f"  (true answer: {result.expected})" if result.expected else ""))
    table = Table("", "all tokens", report.spec, title=f"{result.model}, {result.environment['device']}")
    rows: list[tuple[str, ...]] = [
        ("answer", result.answer_dense, result.answer),
        ("visual tokens entering the LLM", f"{report.visual_tokens[0]}", f"{report.entering[0]}"),
        ("  after the last cut", f"{report.visual_tokens[0]}", f"{report.after_last_cut[0]}"),
        ("  average over layers", f"{report.visual_tokens[0]}", f"{report.layer_average[0]:g}"),
        ("LLM prefill GFLOPs", f"{report.flops_dense / 1e9:.3f}", f"{report.flops / 1e9:.3f}"),
        (
            "  with tower and projector",
            f"{(report.flops_dense + result.encoder_flops['dense']) / 1e9:.3f}",
            f"{(report.flops + result.encoder_flops['compressed']) / 1e9:.3f}",
        ),
        ("time to first token, ms", *(f"{result.ttft[k].median:.1f}" for k in ("dense", "compressed"))),
        ("  20 % .. 80 %", *(f"{t.p20:.1f} .. {t.p80:.1f}" for t in result.ttft.values())),
        ("  of it selection, ms", "", f"{sum(report.selection_ms.values()):.2f}"),
        ("KV cache, KiB", f"{report.kv_bytes_dense / 1024:.0f}", f"{report.kv_bytes / 1024:.0f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}")
    if result.overlay:
        console.print(f"overlay written to {result.overlay}")
