"""The floor of every method: the same model, fed only so many visual tokens, with nothing to decide.

The encoder runs as ever. The language model then gets, as embeddings, a prompt that never held more than these tokens,
without a hook of vtc. Which tokens these are does not matter to the clock; evenly spaced ones are taken, and their
answers mean nothing.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.errors import InputError, UnsupportedFeatureError
from vtc.eval.bench.latency import Variant


def ideal(adapter: Adapter, inputs: Mapping[str, Tensor], kept: int) -> Variant:
    """The floor for prompts that all hold the same number of visual tokens, of which `kept` stay.

    Raises:
        InputError: prompts of different shape.
        UnsupportedFeatureError: the stock model does not generate from embeddings.
    """
    model, inner = adapter.model, adapter.inner
    encoder = next(e for e in adapter.encoders if (inputs["input_ids"] == e.placeholder_id).any())
    is_visual = inputs["input_ids"] == encoder.placeholder_id
    counts = set(is_visual.sum(1).tolist())
    if len(counts) != 1 or not bool(inputs["attention_mask"].all()):
        raise InputError(
            "the ideal is timed on equal prompts, as many visual tokens in each and no padding. Repeat one prompt."
        )
    if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        raise UnsupportedFeatureError(
            f"generate of {type(model).__name__} takes no inputs_embeds in this version of transformers, "
            "so the model cannot be fed a shorter prompt."
        )
    (before,) = counts
    kept = min(kept, before)
    embeds = _door_embeddings(adapter, inputs)
    ranks = is_visual.cumsum(1) - 1
    chosen = torch.linspace(0, before - 1, kept, device=ranks.device).round().long()
    stays = ~is_visual | torch.isin(ranks, chosen)
    length = embeds.shape[1] - before + kept
    short = embeds[stays].view(embeds.shape[0], length, -1)
    mask = torch.ones(short.shape[:2], dtype=torch.long, device=short.device)
    encode: Any = getattr(inner, encoder.method)
    accepted = inspect.signature(encode).parameters
    pixels = {name: value for name, value in inputs.items() if name in accepted and name != "input_ids"}

    def generate(**options: Any) -> Tensor:
        encode(**pixels)
        ids: Tensor = model.generate(inputs_embeds=short, attention_mask=mask, **options)
        return ids

    return Variant(generate, nullcontext)


def _door_embeddings(adapter: Adapter, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the stock model hands to its language model for this prompt, [B, S, D]."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    watch = adapter.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.inference_mode():
            adapter.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        watch.remove()
    return seen[0]
