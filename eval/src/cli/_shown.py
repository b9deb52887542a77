"""What `vtc run`, `vtc doctor` and `vtc eval` print; apart from the commands, which start without its imports."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.engine.host.contract import SWITCH, tested_range
from vtc.eval.bench.prompt import RunResult
from vtc.eval.lmms import presets
from vtc.eval.probe.doctor import Diagnosis
from vtc.eval.results.file import Result, Time
from vtc.testing.self_check import SelfCheck


def show_run(result: RunResult) -> None:
    """Both answers side by side, with what they cost."""
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


def show_diagnosis(found: Diagnosis) -> None:
    """What was found in a model, and which methods run on it."""
    console = Console()
    table = Table("part", "found", title=f"{found.model}: family {found.family}")
    for part, text in found.parts.items():
        table.add_row(part, text)
    console.print(table)
    console.print(f"[bold green]can run[/] {', '.join(found.runs)}")
    for method, reason in found.refused.items():
        console.print(f"[bold red]cannot run[/] [bold]{method}[/]: {reason}", highlight=False)


def show_self_check(found: SelfCheck) -> None:
    """The worst difference of each case, and what to do where one is too large."""
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


def show_presets() -> None:
    """Every published table: its names, its model, and where its numbers were read."""
    console = Console()
    for name in presets.names():
        preset = presets.load(name)
        awaits = f" [yellow](awaits method {preset.awaits})[/]" if preset.awaits else ""
        console.print(f"[bold]{', '.join((name, *preset.aliases))}[/]{awaits}", highlight=False)
        console.print(f"  {preset.title}; {preset.model}; numbers from: {preset.source}", highlight=False, markup=False)


def show_preset(preset: presets.Preset, result: Result) -> None:
    """What was measured beside what a paper printed."""
    console = Console()
    table = Table("", "", *preset.columns, title=f"{preset.title} (arXiv {preset.arxiv})")
    last = None
    for label, what, numbers in presets.comparison(preset, result):
        table.add_row("" if label == last else label, what, *(numbers.get(name, "") for name in preset.columns))
        last = label
    console.print(table)
    limit = (result["run"]["suite"] or {}).get("limit")
    notes = {
        "published numbers": preset.source,
        "budget": preset.convention,
        "caution": f"only the first {limit} questions of each task" if limit else "",
        "note": preset.notes,
        **{name: column.note for name, column in preset.columns.items()},
    }
    for name, text in notes.items():
        if text:
            console.print(f"{name}: {text}", highlight=False, markup=False)
    show_scores(result)


def show_scores(result: Result) -> None:
    """Scores, agreement with the dense model and times of every cell of `vtc eval`."""
    console = Console()
    # the others need a wide terminal; the result file has them in any case
    times: tuple[Time, ...] = ("ttft_ms", "tpot_ms", "selection_ms") if console.width >= 120 else ("ttft_ms",)
    headings = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "selection_ms": "selection ms"}
    table = Table("method", "tokens", "task", "score", "as dense", *(headings[time] for time in times))
    for column in table.columns:
        column.overflow = "fold"
    for name, cell in result["cells"].items():
        if "tasks" not in cell:
            table.add_row(name, "", "refused" if "refused" in cell else "failed")
            continue
        left = [name, f"{cell['tokens']['layer_average']:g}" if "tokens" in cell else ""]
        right = [f"{cell['agreement_with_dense']:.1%}" if "agreement_with_dense" in cell else ""]
        right += [f"{cell[time]['median']:.1f}" if time in cell else "" for time in times]
        for task, record in cell["tasks"].items():
            scores = record["scores"]
            # of a group the whole, if it has a score of its own
            for part in [task] if task in scores else scores:
                text = "\n".join(f"{metric} {value:.4g}" for metric, value in scores[part].items())
                table.add_row(*left, part, text, *right)
                left, right = ["", ""], [""] * len(right)
    console.print(table)
    console.print("tokens: average over layers; TTFT: median of single requests, vision tower included", style="dim")
