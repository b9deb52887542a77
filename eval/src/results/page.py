"""Markdown of result files: the accuracy table of the README, and the results page."""

from collections.abc import Sequence
from pathlib import Path

from vtc.eval.results.file import (
    DENSE,
    REFERENCE,
    Cell,
    Result,
    budget_of,
    latency_of,
    method_of,
    read,
    reason_of,
    run_of,
    state_of,
)
from vtc.eval.results.intervals import Share
from vtc.eval.results.stats import Difference

#: milliseconds and ratios of a cell's timing that the page shows: title, where it is, format
PHASE_COLUMNS = (
    ("encoder", "encoder_ms"),
    ("projector", "projector_ms"),
    ("selection", "selection_ms"),
    ("prefill", "prefill_ms"),
    ("first token", "ttft_ms"),
    ("per token", "decode_ms_per_token"),
)


def markdown(result: Result, methods: Sequence[str] | None = None) -> str:
    """One row per method, one column per budget, Wilson 95 % intervals; `methods` are the rows, None: all."""
    cells = {
        name: cell for name, cell in _answered(result).items() if methods is None or method_of(name, cell) in methods
    }
    budgets = list(dict.fromkeys(budget_of(name, cell) for name, cell in cells.items()))
    specs = list(dict.fromkeys(method_of(name, cell) for name, cell in cells.items()))
    by_place = {(method_of(name, cell), budget_of(name, cell)): cell for name, cell in cells.items()}
    rows = [
        "| method | " + " | ".join(f"{budget} tokens" if budget else "own budget" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for spec in specs:
        rows.append(f"| `{spec}` | " + " | ".join(_share(by_place.get((spec, b))) for b in budgets) + " |")
    dense = result["cells"][DENSE]
    questions = dense["accuracy"]["overall"]["questions"]
    rows += ["", f"All tokens: {_share(dense)} of {questions} held-out questions, 95 % intervals in parentheses."]
    return "\n".join(rows)


def page(paths: Sequence[Path]) -> str:
    """The results page: one section per result file, in the order of their names.

    Raises:
        InputError: a file is no result.
    """
    parts = [
        "# Results",
        "Generated from the result files in `benchmarks/` by `vtc bench report`; do not edit. "
        "[results-format.md](results-format.md) says what each number means.",
    ]
    for path in sorted(paths, key=lambda path: path.name):
        parts += section(read(path), path.name)
    return "\n\n".join(parts) + "\n"


def section(result: Result, name: str) -> list[str]:
    """Heading, conditions and tables of one result file."""
    run, here = run_of(result), result["environment"]
    packages = ", ".join(f"{package} {version}" for package, version in here["packages"].items() if version)
    device = here["device"] if here["device"] != "cpu" else f"{here.get('processor', 'cpu')}, {here['threads']} threads"
    parts = [f"## {title(result)}"]
    parts.append(
        f"`benchmarks/{name}`: {device}, {run.get('dtype', 'float32')}, attention {run.get('attention', 'sdpa')}, "
        f"positions `{run.get('positions', 'auto')}`, {here.get('date', 'undated')}, commit `{here.get('commit')}`, "
        f"{packages}."
    )
    if "accuracy" in result["cells"].get(DENSE, {}):
        parts += ["### Accuracy", markdown(result), *_category_table(result), *_tests_table(result)]
    for batch in run.get("batches", ()):
        parts += _latency_table(result, batch)
    if result.get("selection"):
        parts += ["### Selection alone", selection_table(result)]
    refused = _refused_table(result)
    return [*parts, *refused]


def title(result: Result) -> str:
    """Model and suite in words."""
    run = run_of(result)
    if "arch" in run:
        size = "a scaled-down twin of " if run["arch"]["small"] else ""
        return f"Time on {size}{run['arch']['name']} with random weights"
    suite = run.get("suite")
    name = suite["name"] if isinstance(suite, dict) else "scenes"
    return f"{run['model']} on {name}"


def selection_table(result: Result) -> str:
    """Time of each method's decision alone, fastest first at the smallest size."""
    table = result["selection"]
    sizes = list(table[REFERENCE])
    rows = [
        "Milliseconds of the decision on drawn tokens (median, 20-80 % quantiles) and its share of one dense prefill "
        "of the decoder of LLaVA-1.5-7B with as many visual tokens on the same machine ("
        + ", ".join(f"N={n}: {table[REFERENCE][n]['median']:.0f} ms" for n in sizes)
        + ").",
        "",
        "| method | " + " | ".join(f"N={n}, ms | share" for n in sizes) + " |",
        "|---" * (2 * len(sizes) + 1) + "|",
    ]
    done = {name: row for name, row in table.items() if name != REFERENCE and state_of(row) == "done"}
    for name, row in sorted(done.items(), key=lambda item: item[1][sizes[0]]["median"]):
        cells = [
            f"{row[n]['median']:.2f} ({row[n]['p20']:.2f}-{row[n]['p80']:.2f}) | {row[n]['share']:.2%}" for n in sizes
        ]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _answered(result: Result) -> dict[str, Cell]:
    """Cells of methods and controls, those that were refused included."""
    return {n: c for n, c in result["cells"].items() if n != DENSE and c.get("kind") not in (DENSE, "ideal")}


def _share(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if "accuracy" not in cell:
        return state_of(cell)
    whole = cell["accuracy"]["overall"]
    low, high = (round(100 * bound) for bound in whole["wilson95"])
    return f"{100 * whole['accuracy']:.1f} % ({low}-{high})"


def _category_table(result: Result) -> list[str]:
    """Accuracy per category at the budget that most cells have, or the second largest."""
    dense = result["cells"][DENSE]
    categories = [name for name in dense["accuracy"] if name != "overall"]
    if len(categories) < 2:
        return []
    done = {n: c for n, c in _answered(result).items() if "accuracy" in c}
    parts = []
    for budget in dict.fromkeys(budget_of(name, cell) for name, cell in done.items()):
        rows = ["| method | " + " | ".join(categories) + " |", "|---" * (len(categories) + 1) + "|"]
        chosen = {method_of(n, c): c for n, c in done.items() if budget_of(n, c) == budget}
        for method, cell in {DENSE: dense, **chosen}.items():
            rows.append(f"| `{method}` | " + " | ".join(_percent(cell["accuracy"][name]) for name in categories) + " |")
        heading = f"By category at {budget} tokens, % right (95 % interval)" if budget else "By category"
        parts.append(f"<details><summary>{heading}</summary>\n\n" + "\n".join(rows) + "\n\n</details>")
    return parts


def _percent(cell: Share) -> str:
    low, high = (round(100 * bound) for bound in cell["wilson95"])
    return f"{100 * cell['accuracy']:.0f} ({low}-{high})"


def _tests_table(result: Result) -> list[str]:
    """Each cell against the dense model and against random choice."""
    done = {n: c for n, c in _answered(result).items() if "against" in c}
    if not done:
        return []
    rows = [
        "### Against the dense model and against `random`",
        "Difference in percentage points with its 95 % bootstrap interval and the p-value of the exact McNemar test on "
        "the same questions; agreement is the share of answers that are those of the dense model. p-values are not "
        "corrected for the number of rows.",
    ]
    table = ["| method | budget | against dense | against `random` | agreement |", "|---|---|---|---|---|"]
    for name, cell in done.items():
        tests = [_test(cell["against"].get(reference)) for reference in ("dense", "random")]
        low, high = (100 * bound for bound in cell["agreement_wilson95"])
        agreement = f"{100 * cell['agreement_with_dense']:.0f} % ({low:.0f}-{high:.0f})"
        table.append(f"| `{method_of(name, cell)}` | {budget_of(name, cell)} | {' | '.join(tests)} | {agreement} |")
    return [*rows, "\n".join(table)]


def _test(found: Difference | None) -> str:
    if found is None:
        return ""
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['difference']:+.1f} ({low:+.1f} .. {high:+.1f}), p = {found['p']:.2g}"


def _latency_table(result: Result, batch: int) -> list[str]:
    """Phases of every timed cell at one batch size."""
    timed = {
        name: entry
        for name, cell in result["cells"].items()
        if state_of(cell) == "done" and (entry := latency_of(cell, batch)) is not None
    }
    if not timed:
        return []
    titles = [text for text, _ in PHASE_COLUMNS]
    rows = [
        "| method | budget | "
        + " | ".join(titles)
        + " | gain | of predicted | encoder share | GFLOPs | KV MiB | peak MiB |",
        "|---" * (len(titles) + 8) + "|",
    ]
    for name, entry in timed.items():
        cell, phases = result["cells"][name], entry["phases"]
        times = [f"{phases[key]['median']:.2f}" if key in phases else "" for _, key in PHASE_COLUMNS]
        first = phases["ttft_ms"]
        times[4] = f"{first['median']:.1f} ({first['p20']:.1f}-{first['p80']:.1f})"
        gain = [f"{entry['speed_up']:.2f}x", f"{entry['realised']:.0%}"] if "speed_up" in entry else ["", ""]
        peak = entry.get("peak_bytes")
        rest = [
            f"{entry['encoder_share']:.0%}",
            f"{sum(entry['flops'].values()) / 1e9:.3g}",
            f"{entry['kv_bytes'] / 2**20:.2f}",
            f"{peak / 2**20:.1f}" if peak is not None else "",
        ]
        row = [f"`{method_of(name, cell)}`", budget_of(name, cell), *times, *gain, *rest]
        rows.append("| " + " | ".join(row) + " |")
    return [
        f"### Time and memory, batch {batch}",
        "Milliseconds, medians (20-80 % quantiles for the first token). Gain is the dense model's time to first token, "
        "taken in turns with the cell's, over the cell's own; *of predicted* divides it by the gain that the FLOPs of "
        "tower, projector and prefill predict. `ideal` is the same model fed only so many tokens, with nothing to "
        "decide: the floor. FLOPs and KV bytes are per sample; peak memory is what the call allocates beyond the "
        "weights.",
        "\n".join(rows),
    ]


def _refused_table(result: Result) -> list[str]:
    reasons = {
        method_of(name, cell): reason_of(cell).replace("|", "\\|").replace("\n", " ")
        for name, cell in result["cells"].items()
        if state_of(cell) != "done"
    }
    if not reasons:
        return []
    rows = ["| method | why |", "|---|---|", *(f"| `{method}` | {reason} |" for method, reason in reasons.items())]
    return ["### Not run", "\n".join(rows)]
