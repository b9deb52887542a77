"""Options that several commands share, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from vtc.eval.bench.cells import image_methods
from vtc.tokens import Budget

Methods = Annotated[
    str, typer.Option("--methods", help="Spec strings, separated by commas; 'all' for every image method.")
]
Budgets = Annotated[str | None, typer.Option("--budgets", help="Token counts or shares, separated by commas.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub id. None: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Attention = Annotated[str | None, typer.Option(help="eager, sdpa or flash_attention_2.")]
Positions = Annotated[str, typer.Option(help="Position ids: original, compact or auto.")]
Questions = Annotated[
    Path | None, typer.Option(help="Own questions: JSON lines with image, question, answer, category.")
]
Out = Annotated[Path, typer.Option(help="Result file; finished cells in it are not run again.")]

#: what `vtc bench` does where nothing is said, and with --quick: budgets, questions per category, timed runs
FULL = ("64", 25, 5)
QUICK = ("64", 5, 3)


def split(text: str, signs: str = ",") -> list[str]:
    """The parts of a list, stripped; signs inside parentheses belong to a part."""
    parts, depth = [""], 0
    for sign in text:
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if sign in signs and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def specs(text: str) -> list[str]:
    """Spec strings of a comma-separated list; "all" is every image method."""
    return list(image_methods()) if text == "all" else split(text)


def budgets(text: str) -> list[int | float]:
    """Token counts and shares of a comma-separated list.

    Raises:
        BudgetError: one of them is no budget.
    """
    found = [Budget.of(part) for part in text.split(",")]
    return [value for budget in found if (value := budget.tokens if budget.tokens is not None else budget.ratio)]
