"""Options that several commands share, how their texts are read, and what is refused before anything is loaded.

Free of torch where a model is not needed, so that help and refusals come at once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from vtc.budget import Budget
from vtc.catalogue.names import check_method
from vtc.errors import InputError
from vtc.grammar import segments
from vtc.settings import (
    ATTENTION,
    DTYPES,
    POSITIONS,
    check_attention,
    check_device,
    check_dtype,
    check_model,
    check_positions,
)

Methods = Annotated[
    str, typer.Option("--methods", help="Spec strings, separated by commas; 'all' for every image method.")
]
Budgets = Annotated[str | None, typer.Option("--budgets", help="Token counts or shares, separated by commas.")]
Model = Annotated[str | None, typer.Option(help="Folder or hub id. None: the embedded model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")]
Attention = Annotated[str | None, typer.Option(help=f"{', '.join(ATTENTION)}.")]
Positions = Annotated[str, typer.Option(help=f"Position ids: {', '.join(POSITIONS)} or auto.")]
Questions = Annotated[
    Path | None, typer.Option(help="Own questions: JSON lines with image, question, answer, category.")
]
Out = Annotated[Path, typer.Option(help="Result file; finished cells in it are not run again.")]

#: names that help lists and that are refused without importing what bears them; a test compares them with it
ARCHITECTURES = (
    "gemma-3-4b",
    "internvl3-8b",
    "llava-1.5-13b",
    "llava-1.5-7b",
    "llava-next-7b",
    "llava-onevision-7b",
    "qwen2-vl-7b",
    "qwen2.5-vl-7b",
    "qwen3-vl-8b",
)
COSTS = ("ttft", "decode", "selection", "prefill", "memory", "kv", "flops", "tokens", "average_tokens")
CALIBRATIONS = ("dymu", "shortv")

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
    if text != "all":
        return split(text)
    from vtc.eval.bench.cells import image_methods

    return list(image_methods())


def budgets(text: str) -> list[int | float]:
    """Token counts and shares of a comma-separated list.

    Raises:
        BudgetError: one of them is no budget.
    """
    found = [Budget.of(part) for part in text.split(",")]
    return [value for budget in found if (value := budget.tokens if budget.tokens is not None else budget.ratio)]


def refuse(
    specs: Iterable[str] = (),
    *,
    positions: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    model: str | None = None,
    device: str | None = None,
    reads: Mapping[str, Path | None] | None = None,
    writes: Path | None = None,
) -> None:
    """Refuse what is wrong in a command, before transformers is imported or a model is loaded.

    Names, budgets, words and files need no torch and come first; the device and the options of methods need it.

    Args:
        specs: spec strings, with or without budgets.
        reads: what a file is -> where it should be.
        writes: a file whose folder must be there.

    Raises:
        SpecError, BudgetError: a name, a word, a budget or an option is wrong.
        InputError, UnsupportedModelError: a file, a folder or a model is not there.
    """
    specs = tuple(specs)
    for segment in (segment for spec in specs for segment in segments(spec)):
        check_method(segment.slug)
    check_positions(positions)
    check_dtype(dtype)
    check_attention(attention)
    check_model(model)
    for what, path in (reads or {}).items():
        if path is not None and not path.is_file():
            raise InputError(f"no {what} at {str(path)!r}.")
    if writes is not None and not writes.absolute().parent.is_dir():
        folder = str(writes.absolute().parent)
        raise InputError(f"{str(writes)!r} cannot be written: there is no folder {folder!r}. Create it first.")
    check_device(device)
    if specs:
        from vtc.spec import parse

        for spec in specs:
            parse(spec)
