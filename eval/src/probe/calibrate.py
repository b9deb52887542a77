"""What methods measure once per model: `vtc calibrate METHOD` writes it as a file with the options that it leads to."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import vtc
from vtc.adapter import adapter_for
from vtc.errors import InputError, unknown_name
from vtc.eval.bench.accuracy import Prepared
from vtc.eval.data import suites
from vtc.loading import Loaded
from vtc.methods.dymu import ThresholdFinder

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


def shortv(loaded: Loaded, prepared: Prepared, keep: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and numbers for ShortV: all layers by ascending contribution, the later one first on ties."""
    if keep is not None:
        raise InputError(
            "--keep is for dymu: shortv keeps every token, and its budget says how many layers it freezes."
        )
    scores = layer_contributions(loaded.model, prepared.batches)
    order = sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))
    return {"layers": order}, {"contribution": [float(f"{score:.4g}") for score in scores]}


def merge_thresholds(model: nn.Module, batches: Iterable[Inputs], keep: int, schedule: str = "constant") -> list[float]:
    """Thresholds of DyMU (arXiv 2504.17040), one per block of the vision tower that comes before the features.

    Args:
        model: the unpatched model.
        batches: model inputs with images; the best pairs of a whole batch are merged, so batches should be large.
        keep: patches that stay of each image (tile), on average.
        schedule: how the merges spread over the blocks, as in DyMU.

    Raises:
        InputError: no batch, or `keep` is not below the number of patches.
    """
    encoder = adapter_for(model).encoders[0]
    config: Any = encoder.tower.config
    patches = (config.image_size // config.patch_size) ** 2
    if not 0 < keep < patches:
        raise InputError(f"keep={keep}: between 1 and {patches - 1} of the {patches} patches of an image can stay.")
    finder = ThresholdFinder(total=patches - keep, blocks=encoder.reach, schedule=schedule)
    with torch.inference_mode(), vtc.compress(model, finder, positions="original"):
        for inputs in batches:
            model(**inputs, use_cache=False)
    if not any(finder.seen.values()):
        raise InputError("a calibration needs at least one sample.")
    return list(finder.thresholds)


def dymu(loaded: Loaded, prepared: Prepared, keep: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and numbers for DyMU: the thresholds that keep `keep` tokens on average."""
    if keep is None:
        raise InputError("dymu is calibrated to a number of tokens. Say how many stay on average: --keep 64.")
    thresholds = [float(f"{value:.6g}") for value in merge_thresholds(loaded.model, prepared.batches, keep)]
    return {"thresholds": thresholds}, {"keep": keep}


#: method -> what finds its options and the numbers behind them
CALIBRATIONS: Mapping[str, Callable[[Loaded, Prepared, int | None], tuple[dict[str, Any], dict[str, Any]]]] = {
    "dymu": dymu,
    "shortv": shortv,
}


def calibrate(
    method: str, loaded: Loaded, suite: suites.Suite, batch_size: int = 8, keep: int | None = None
) -> Calibration:
    """Calibrate `method` for a model on the prompts of a suite; the same suite gives the same result.

    `keep` is the number of tokens that stay on average, for methods that are calibrated to one (dymu).

    Raises:
        SpecError: the method needs no calibration.
    """
    if method not in CALIBRATIONS:
        raise unknown_name("method with a calibration", method, CALIBRATIONS, "vtc calibrate --help")
    options, measured = CALIBRATIONS[method](loaded, Prepared(loaded, suite, batch_size), keep)
    return Calibration(method, loaded.name, options, measured, suite.about)
