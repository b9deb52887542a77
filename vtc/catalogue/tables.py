"""Markdown tables of methods and models, generated from the registries; `docs/` holds their output."""

from collections.abc import Iterable, Sequence
from typing import Any

from vtc.catalogue.capabilities import capabilities, describe
from vtc.catalogue.registry import declared, methods
from vtc.signals import SIGNALS

METHODS = """# Methods

{methods} methods, {controls} of them controls.

Written by `vtc methods --markdown > docs/methods.md`; `vtc methods --json` has all of this as data, with the options
and defaults of each method and the reason of every refusal.

Fidelity: "golden" is equal to recorded outputs of the authors' own code, where the docstring names no exception;
"paper" is checked against the text; "reconstructed": what was read left choices open, which are options of the method;
"control": a baseline that every method has to beat. Count: "exact" methods meet the budget, for "adaptive" ones it is
a ceiling. Families: where the default setting passes the checks of `vtc.patch`, tried on models with 32 decoder layers.
The docstring of a method names options for the others, and `vtc doctor MODEL` says what runs on one checkpoint."""

STEPS = """## Filter, correlate, compress"""

PUBLISHED = """## Published numbers

One for each paper, with what its budget counts and where it was read. None was measured here ([results.md](results.md)
has those), and averages over other benchmarks, or under other kinds of budget, are not comparable."""


def methods_page() -> str:
    """The page of all methods: what each is and where it runs, what it does, and what was published about it."""
    fidelities = [declared(slug)["fidelity"] for slug in methods()]
    intro = METHODS.format(methods=len(fidelities), controls=fidelities.count("control"))
    return "\n\n".join((intro, methods_table(), STEPS, steps_table(), PUBLISHED, published_table())) + "\n"


def methods_table() -> str:
    """One row per method: where it comes from, where it acts, what it needs, where it runs, how faithful it is."""
    rows = []
    for slug in methods():
        data = describe(slug, families=True)
        needs = filter(None, (", ".join(data["signals"]), data["requires"]))
        rows.append(
            (
                f"`{slug}`",
                _paper(data),
                ", ".join(data["sites"]),
                "; ".join(needs) or "features",
                "adaptive" if data["adaptive"] else "exact",
                data["positions"],
                _where(data),
                data["fidelity"],
            )
        )
    return _table(("method", "paper", "site", "needs", "count", "positions", "families", "fidelity"), rows)


def steps_table() -> str:
    """One row per method: its three steps."""
    names = ("filter", "correlate", "compress")
    rows = [(f"`{data['method']}`", *(data[name] for name in names)) for data in map(declared, methods())]
    return _table(("method", *names), rows)


def signals_table() -> str:
    """One row per signal: its axes, where it can be read, and what it holds."""
    rows = []
    for name, kind in SIGNALS.items():
        shape = f"`[{', '.join(kind.axes)}]`" + (f" {kind.dtype}" if kind.dtype != "float" else "")
        others = [f"`{other}`" for other in kind.comes_with if other != name]
        doc = f"{kind.doc}; comes with {', '.join(others)}" if others else kind.doc
        rows.append((f"`{name}`", shape, ", ".join(kind.sites), doc))
    return _table(("signal", "shape", "sites", "what it is"), rows)


def published_table() -> str:
    """One row per method that has a paper: its headline number."""
    rows = [(f"`{d['method']}`", d["headline"] or "none read") for d in map(declared, methods()) if d["arxiv"]]
    return _table(("method", "published"), rows)


def _paper(data: dict[str, Any]) -> str:
    if not data["arxiv"]:
        return "control"
    return f"[{data['title']}](https://arxiv.org/abs/{data['arxiv']}) {data['venue'] or ''}".strip()


def _where(data: dict[str, Any]) -> str:
    """The families in few words."""
    runs, helped, refused = data["families"], data["families_with_companion"], data["families_refused"]
    if not helped and len(refused) < len(runs):
        return f"all but {', '.join(refused)}" if refused else "all"
    return "; ".join(filter(None, (", ".join(runs), "with a companion: " * bool(helped) + ", ".join(helped)))) or "none"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def models_table() -> str:
    """One row per family: what it takes and where stages may act; below it what is refused, with the reason."""
    rows = [
        "| family | `config.model_type` | takes | sites | `tower_out` lacks | layers from | positions | checkpoints |"
    ]
    rows.append("|" + "---|" * 8)
    refused: dict[str, list[str]] = {}
    for entry in capabilities():
        sites = entry["sites"]
        cells = [
            entry["family"],
            ", ".join(f"`{name}`" for name in entry["model_types"]),
            " and ".join(entry["modalities"]),
            ", ".join(name for name, site in sites.items() if site["available"]),
            ", ".join(sites["tower_out"].get("missing", {})) or "nothing",
            str(entry["lowest_layer"]["layer"]),
            ", ".join(name for name, reason in entry["positions"].items() if reason is None),
            ", ".join(f"`{name}`" for name in entry["checkpoints"]),
        ]
        rows.append("| " + " | ".join(cells) + " |")
        if entry["lowest_layer"]["reason"]:
            refused.setdefault(f"Dropping in earlier layers: {entry['lowest_layer']['reason']}.", []).append(cells[0])
        for name, reason in entry["refused"].items():
            refused.setdefault(f"{name}: {reason}.", []).append(cells[0])
        for name, site in sites.items():
            if not site["available"]:
                reason = site["reason"].replace(f" on {cells[0]}", "").replace(f" of {cells[0]}", "")
                refused.setdefault(f"Site `{name}`: {reason}", []).append(cells[0])
    whole = len(rows) - 2
    rows += ["", "| refused | families |", "|---|---|"]
    for reason, names in refused.items():
        rows.append(f"| {reason} | {'all' if len(names) == whole else ', '.join(names)} |")
    return "\n".join(rows)
