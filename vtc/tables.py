"""Markdown tables of methods and models, generated from the registries; `docs/` holds their output."""

from vtc.adapter import adapter_classes
from vtc.registry import describe, methods


def methods_table() -> str:
    """One row per method: what it is, where it acts, what it reads, how faithful it is."""
    rows = ["| method | paper | site | reads | filter | correlate | compress | count | positions | fidelity |"]
    rows.append("|" + "---|" * 10)
    for slug in methods():
        data = describe(slug)
        paper = (
            f"[{data['title']}](https://arxiv.org/abs/{data['arxiv']}) {data['venue']}" if data["arxiv"] else "control"
        )
        cells = [
            f"`{slug}`",
            paper.strip(),
            ", ".join(data["sites"]),
            ", ".join(data["signals"]) or "features",
            data["filter"],
            data["correlate"],
            data["compress"],
            "adaptive" if data["adaptive"] else "exact",
            data["positions"],
            data["fidelity"],
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def models_table() -> str:
    """One row per family."""
    rows = ["| family | `config.model_type` | checkpoints it is meant for |", "|---|---|---|"]
    for cls in adapter_classes():
        types = ", ".join(f"`{name}`" for name in cls.model_types)
        rows.append(f"| {cls.family} | {types} | {', '.join(f'`{name}`' for name in cls.checkpoints)} |")
    return "\n".join(rows)
