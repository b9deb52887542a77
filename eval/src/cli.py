"""Commands that run or read models: `vtc run`, `vtc bench`, `vtc doctor`."""

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vtc.cli import Json, Markdown, app, print_json
from vtc.eval.accuracy import markdown, sweep
from vtc.eval.doctor import diagnose
from vtc.eval.loading import embedded_path, load, open_image
from vtc.eval.run import RunResult, run
from vtc.eval.scenes import CATEGORIES, draw_scene, questions
from vtc.registry import methods
from vtc.spec import parse
from vtc.tokens import Budget


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
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; its config is enough.")] = None,
    as_json: Json = False,
) -> None:
    """Say what vtc finds in a model, which methods can run on it, and why the others cannot."""
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


@app.command("bench")
def bench_command(
    method: Annotated[
        str, typer.Option("--methods", help="Spec strings without budget, separated by commas; 'all' for every method.")
    ] = "all",
    budget: Annotated[str, typer.Option("--budgets", help="Token counts or shares, separated by commas.")] = "64",
    per_category: Annotated[int, typer.Option(min=1, help="Questions of each category.")] = 25,
    model: Annotated[str | None, typer.Option(help="Folder or hub id. None: the embedded model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")] = None,
    positions: Annotated[str, typer.Option(help="Position ids: original, compact or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the suite.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file; finished cells in it are not run again.")] = Path(
        "bench.json"
    ),
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Accuracy of methods at token budgets on the drawn scenes, with 95 % intervals, beside the dense model."""
    chosen = list(methods()) if method == "all" else [name.strip() for name in method.split(",")]
    wanted = [resolved.tokens or resolved.ratio for resolved in map(Budget.of, budget.split(","))]
    for spec in chosen:
        parse(spec, 1)  # a typing error shows before anything runs
    console = Console(stderr=True)
    result = sweep(
        load(model, device),
        chosen,
        [value for value in wanted if value is not None],
        per_category,
        positions=positions,
        seed=seed,
        path=out,
        progress=lambda line: console.print(line, highlight=False),
    )
    if as_json:
        print_json(result)
        return
    if as_markdown:
        typer.echo(markdown(result))
        return
    output = Console()
    # eight more columns need a wide terminal; the result file has them in any case
    categories = CATEGORIES if output.width >= 140 else ()
    table = Table("method", "tokens", "accuracy", "95 %", "as dense", *categories, title=result["suite"]["model"])
    for name, cell in result["cells"].items():
        if "accuracy" not in cell:
            table.add_row(name, "refused")
            continue
        whole = cell["accuracy"]["overall"]
        low, high = whole["wilson95"]
        entering = str(cell["tokens"]["entering_llm"]) if "tokens" in cell else ""
        agreement = f"{cell['agreement_with_dense']:.0%}" if "agreement_with_dense" in cell else ""
        by_category = [f"{cell['accuracy'][category]['accuracy']:.0%}" for category in categories]
        table.add_row(name, entering, f"{whole['accuracy']:.1%}", f"{low:.0%} .. {high:.0%}", agreement, *by_category)
    output.print(table)


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
        ("  with vision tower", *(f"{(f + result.tower_flops) / 1e9:.3f}" for f in (report.flops_dense, report.flops))),
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
