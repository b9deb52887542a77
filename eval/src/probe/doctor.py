"""What vtc finds in a model, and which methods can run on it; a config without weights is enough."""

from dataclasses import dataclass
from typing import Any

import torch

import vtc
from vtc.adapter import Adapter, adapter_for
from vtc.catalogue.registry import create, methods
from vtc.engine.host import names
from vtc.engine.planning import make_plan
from vtc.errors import UnsupportedModelError, VTCError


@dataclass(frozen=True)
class Diagnosis:
    """The probe of one model.

    Args:
        model: what was probed.
        family: the adapter that serves it.
        parts: what was found where, as readable text.
        runs: methods that can run.
        refused: method -> why it cannot.
    """

    model: str
    family: str
    parts: dict[str, str]
    runs: tuple[str, ...]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return vars(self)


def diagnose(name: str) -> Diagnosis:
    """Probe a folder or hub id; only its config is read, the model is built without memory.

    Raises:
        UnsupportedModelError: there is no config, or no adapter serves the model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read the config of {name!r}: {error}") from error
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is no image-text-to-text model of transformers, so there is nothing "
            "to patch. `vtc models` lists the families."
        ) from error
    return examine(model, name)


def examine(model: Any, name: str) -> Diagnosis:
    """Probe a model that is built already.

    Raises:
        UnsupportedModelError: no adapter serves it.
    """
    adapter = adapter_for(model)
    runs, refused = [], {}
    for slug in methods():
        method = create(slug, budget=vtc.Budget(ratio=0.5))  # a share has a meaning for every method
        try:
            make_plan(adapter, (method,), "auto", size_bias=None)
        except VTCError as error:
            refused[slug] = str(error)
        else:
            runs.append(slug)
    return Diagnosis(name, adapter.family, _parts(adapter), tuple(runs), refused)


def _parts(adapter: Adapter) -> dict[str, str]:
    config = adapter.text_config
    parts = {
        "class": type(adapter.model).__name__,
        "language model": f"{type(adapter.language_model).__name__}, {len(adapter.layers)} layers of width "
        f"{config.hidden_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} key heads",
        "attention": str(names.attention_of(config)),
    }
    for encoder in adapter.encoders:
        cls = "with [CLS]" if encoder.num_prefix else "without [CLS]"
        where = "before the projector" if encoder.features is not None else "on the encoder's output"
        parts[encoder.modality] = (
            f"{encoder.method}, {type(encoder.tower).__name__} {cls}, placeholder id {encoder.placeholder_id}, "
            f"tower_out acts {where}"
        )
    return parts
