"""The card of the embedded model, written from its `training.json`.

python -m vtc.eval.scenes.card model_cards/scenes-llava
"""

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any


def card(record: dict[str, Any]) -> str:
    """The README of the model: `card.md` with the numbers of `record`, which are named there as in the record."""
    dense, cls = record["dense"], record["cls_attention"]
    lowest, weakest = min((dense[name]["accuracy"], name) for name in dense if name != "overall")
    template = (resources.files("vtc.eval.scenes") / "card.md").read_text(encoding="utf-8")
    return template.format(
        **record,
        millions=record["parameters"] / 1e6,
        questions=dense["colour"]["questions"],
        rows=_accuracy_rows(record),
        weakest=weakest,
        Weakest=weakest.capitalize(),
        lowest=100 * lowest,
        packages=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        stages=_stage_rows(record),
        changes="\n".join(f"- {line}" for line in record["history"]),
        curve=_loss_rows(record),
        on_objects=100 * cls["on_objects"],
        object_cells=100 * cls["object_cells"],
    )


def _accuracy_rows(record: dict[str, Any]) -> str:
    dense, kept = record["dense"], record["random_11_percent"]
    return "\n".join(f"| {name} | {_share(dense[name])} | {_share(kept[name])} |" for name in dense)


def _stage_rows(record: dict[str, Any]) -> str:
    return "\n".join(
        f"| `{s['name']}` | {s['grid']} x {s['grid']} = {s['grid'] ** 2} | {s['steps']} | {s['batch']} "
        f"| {s['learning_rate']} | {s['num_objects'][0]}-{s['num_objects'][1]} |"
        for s in record["preset"]["stages"]
    )


def _loss_rows(record: dict[str, Any]) -> str:
    log = record["log"]
    return "\n".join(
        f"| {x['step']} | {x['stage']} | {x['content']:.2f} | {x['cls']:.2f} | {_loss(x, 'answer')} "
        f"| {_loss(x, 'description')} |"
        for x in [*log[:-1:8], log[-1]]
    )


def _share(row: dict[str, Any]) -> str:
    low, high = row["wilson95"]
    return f"{100 * row['accuracy']:.1f} ({row['right']}/{row['questions']}, {100 * low:.1f}-{100 * high:.1f})"


def _loss(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "-"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(card(json.loads((folder / "training.json").read_text())))
