"""The oracle: dropping tokens while keeping their positions equals the full model with their keys masked.

It shares no code with the engine: the stock model runs on all tokens, with explicit masks handed to each layer. What
the host itself hides or shows (padding, bidirectional image blocks, sliding windows) stays as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import adapter_for

Visible = Callable[[int], Tensor]


def masked_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    visible: Visible,
    *,
    replace: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Logits [B, S, V] of the stock model in which layer l may look at the columns `visible(l)` ([B, S] bool) only.

    Args:
        model: the unpatched model.
        inputs: as for the patched one.
        replace: (is_replaced [B, S], values [R, D]) rows of the LLM's input that are overwritten first, for maps
            that merge.
        position_ids: [B, S]; None: what the host hands to its language model, or else counted over the attention mask.
        key_bias: [B, S] added to the attention logits of each key.
    """
    adapter = adapter_for(model)
    lm: Any = adapter.language_model
    batch, length = inputs["input_ids"].shape
    padding = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.long)).bool()
    counted = (padding.long().cumsum(1) - 1).clamp(min=0)
    order = torch.arange(length)
    causal = (order <= order[:, None]) & padding[:, None, None, :]
    dtype = next(lm.parameters()).dtype
    eager = lm.config._attn_implementation == "eager"

    def mask(layer: int, host: Tensor | None) -> Tensor:
        shown = causal if host is None or host.dim() != 4 else host if host.dtype == torch.bool else host == 0
        # a row may always look at itself, so that rows of dropped tokens stay finite; they are not compared
        allowed = shown & visible(layer)[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        if not eager and key_bias is None:
            return allowed
        bias = 0.0 if key_bias is None else key_bias[:, None, None, :].to(dtype)
        return (torch.zeros(allowed.shape, dtype=dtype) + bias).masked_fill(~allowed, torch.finfo(dtype).min)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids") if position_ids is None else position_ids
        kwargs = {**kwargs, "position_ids": counted if given is None else given}
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = padding.long()  # else gaps in the positions are read as packed sequences
        if replace is not None:
            embeds = kwargs["inputs_embeds"].clone()
            embeds[replace[0]] = replace[1].to(embeds.dtype)
            kwargs["inputs_embeds"] = embeds
        return args, kwargs

    def layer_hook(index: int) -> Callable[..., Any]:
        return lambda module, args, kwargs: (
            args,
            {**kwargs, "attention_mask": mask(index, kwargs.get("attention_mask"))},
        )

    hooks = [lm.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(layer_hook(i), with_kwargs=True) for i, layer in enumerate(adapter.layers)
    ]
    try:
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits
    finally:
        for hook in hooks:
            hook.remove()


def visible_columns(cache: Any, length: int, dense: int = 0) -> Visible:
    """What the layers of a compressed `cache` hold of a prompt of `length` columns, and of `dense` later ones."""
    memory = cache._vtc

    def visible(layer: int) -> Tensor:
        column = memory.layers[layer].column
        seen = torch.zeros(column.shape[0], length + 1, dtype=torch.bool)
        seen[torch.arange(column.shape[0])[:, None], torch.where(column < 0, length, column)] = True
        return torch.cat([seen[:, :length], torch.ones(column.shape[0], dense, dtype=torch.bool)], dim=1)

    return visible


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())
