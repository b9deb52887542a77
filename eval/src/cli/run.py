"""Commands that run or read models: `vtc run`, `vtc doctor`, `vtc calibrate`, and those of `vtc.eval.cli.bench`."""

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.cli import Json, app, print_json
from vtc.engine.host.contract import SWITCH, tested_range
from vtc.eval.bench.prompt import RunResult, run
from vtc.eval.cli import bench
from vtc.eval.loading import embedded_path, load, open_image
from vtc.eval.probe.calibrate import calibrate_command
from vtc.eval.probe.doctor import diagnose
from vtc.eval.scenes.draw import draw_scene, questions
from vtc.testing.self_check import self_check

bench.add_to(app)
app.command("calibrate")(calibrate_command)


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
    positions: Annotated[str, typer.Option(help="Position ids: original, compact or auto.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    attention: Annotated[str | None, typer.Option(help="eager, sdpa or flash_attention_2.")] = None,
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
    for note in report.notes:
        console.print(f"note: {note}")
    if result.overlay:
        console.print(f"overlay written to {result.overlay}")
