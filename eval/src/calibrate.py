"""What methods measure once per model: `vtc calibrate METHOD` writes it as a file with the options that it leads to."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

import vtc
from vtc.adapter import adapter_for
from vtc.cli import Json, print_json
from vtc.errors import InputError, unknown_name
from vtc.eval import suites
from vtc.eval.accuracy import Prepared
from vtc.eval.loading import Loaded, load

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Args:
        method: slug of the method.
        model: name of the model.
        options: options of the method, for `vtc.create(method, **options)`.
        measured: the numbers behind them.
        suite: what the model was shown.
        version: of this form.
    """

    method: str
    model: str
    options: dict[str, Any]
    measured: dict[str, Any]
    suite: dict[str, Any]
    version: int = 1

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def layer_contributions(model: nn.Module, batches: Iterable[Inputs]) -> list[float]:
    """Layer Contribution of ShortV (arXiv 2504.00502) of every decoder layer.

    LC of layer l is KL(p_l || p) of the next-token distributions, mean over samples: p of the model as it is, p_l with
    the visual tokens of layer l neither attending nor passing its FFN. One plain forward and one per layer.

    Args:
        model: the unpatched model.
        batches: model inputs; prompts padded on the left, so that the last column is the last token.
    """
    layers = len(adapter_for(model).layers)
    total, samples = torch.zeros(layers, dtype=torch.float64), 0
    with torch.inference_mode():
        for inputs in batches:
            full = _next_token(model, inputs)
            samples += full.shape[0]
            for layer in range(layers):
                with vtc.compress(model, vtc.create("shortv", layers=(layer,))):
                    frozen = _next_token(model, inputs)
                total[layer] += divergence(frozen, full).cpu()
    if not samples:
        raise InputError("a calibration needs at least one sample.")
    return [float(value) for value in total / samples]


def divergence(frozen: Float[Tensor, "B V"], full: Float[Tensor, "B V"]) -> Float[Tensor, ""]:
    """Sum over samples of KL(frozen || full), both as log probabilities."""
    return (frozen.exp() * (frozen - full)).sum()


def _next_token(model: Any, inputs: Inputs) -> Tensor:
    """Log probabilities of the next token, float64 [B, V]."""
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("prompts are padded on the right, so the last column is not their last token. Pad them left.")
    logits: Tensor = model(**inputs, use_cache=False).logits[:, -1]
    return logits.double().log_softmax(dim=-1)


def shortv(loaded: Loaded, prepared: Prepared) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and numbers for ShortV: all layers by ascending contribution, the later one first on ties."""
    scores = layer_contributions(loaded.model, prepared.batches)
    order = sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))
    return {"layers": order}, {"contribution": [float(f"{score:.4g}") for score in scores]}


#: method -> what finds its options and the numbers behind them
CALIBRATIONS: Mapping[str, Callable[[Loaded, Prepared], tuple[dict[str, Any], dict[str, Any]]]] = {"shortv": shortv}


def calibrate(method: str, loaded: Loaded, suite: suites.Suite, batch_size: int = 8) -> Calibration:
    """Calibrate `method` for a model on the prompts of a suite; the same suite gives the same result.

    Raises:
        SpecError: the method needs no calibration.
    """
    if method not in CALIBRATIONS:
        raise unknown_name("method with a calibration", method, CALIBRATIONS, "vtc calibrate --help")
    options, measured = CALIBRATIONS[method](loaded, Prepared(loaded, suite, batch_size))
    return Calibration(method, loaded.name, options, measured, suite.about)


def calibrate_command(
    method: Annotated[str, typer.Argument(help=f"What to calibrate: {', '.join(CALIBRATIONS)}.")],
    out: Annotated[Path, typer.Option(help="Where to write what was found, as JSON.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id. None: the embedded model.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Own questions: JSON lines with image, question, answer, category.")
    ] = None,
    per_category: Annotated[
        int, typer.Option(min=1, help="Drawn questions of each of the eight categories, without --data.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the drawn questions.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... None: a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure what a method needs to know about a model, on validation scenes or your own questions."""
    if method not in CALIBRATIONS:
        raise unknown_name("method with a calibration", method, CALIBRATIONS, "vtc calibrate --help")
    # no test scenes: what is chosen here is measured on those
    suite = suites.scenes(per_category, seed, split="val") if data is None else suites.from_file(data)
    found = calibrate(method, load(model, device, dtype), suite, batch_size)
    found.write(out)
    if as_json:
        print_json(asdict(found))
        return
    console = Console()
    for part in (found.options, found.measured):
        for name, value in part.items():
            console.print(f"{name}: {value}", soft_wrap=True, highlight=False)
    console.print(f"written to {out}")
