"""The oracle: dropping tokens while keeping their positions equals the full model with their keys masked.

It shares no code with the engine: the stock model runs on all tokens, with explicit masks handed to each layer. What
the host itself hides or shows (padding, bidirectional image blocks, sliding windows) stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.stages import Method, Stage

Visible = Callable[[int], Tensor]


@dataclass(frozen=True)
class GivenStages(Method):
    """A method that is nothing but the stages handed over, for tests of one stage or of several together."""

    slug: ClassVar[str] = "given-stages"
    tags: ClassVar[frozenset[str]] = frozenset({"adaptive"})
    given: tuple[Stage, ...] = ()

    def stages(self) -> tuple[Stage, ...]:
        return self.given


def masked_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    visible: Visible,
    *,
    replace: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    key_bias: Tensor | Visible | None = None,
    unchanged: Visible | None = None,
    layer_positions: Visible | None = None,
    entering: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits [B, S, V] of the stock model in which layer l may look at the columns `visible(l)` only.

    `visible(l)` is [B, S] bool, or [B, S, S] where it depends on who looks.

    Args:
        model: the unpatched model.
        inputs: as for the patched one.
        replace: (is_replaced [B, S], values [R, D]) rows of the LLM's input that are overwritten first, for maps
            that merge.
        position_ids: [B, S]; None: what the host hands to its language model, or else counted over the attention mask.
        key_bias: [B, S] added to the attention logits of each key; l -> [B, S] where layers differ.
        unchanged: l -> [B, S] bool, columns that layer l leaves as they entered it (frozen or parked tokens).
        layer_positions: l -> [B, S] position ids of layer l, where layers differ.
        entering: (l, hidden states [B, S, D]) -> those that enter layer l, for maps that merge inside the LLM.
    """
    adapter = adapter_for(model)
    lm: Any = adapter.language_model
    batch, length = inputs[names.INPUT_IDS].shape
    padding = inputs.get(names.ATTENTION_MASK, torch.ones(batch, length, dtype=torch.long)).bool()
    counted = (padding.long().cumsum(1) - 1).clamp(min=0)
    order = torch.arange(length)
    causal = (order <= order[:, None]) & padding[:, None, None, :]
    dtype = next(lm.parameters()).dtype
    eager = names.attention_of(lm.config) == "eager"

    def mask(layer: int, host: Tensor | None) -> Tensor:
        shown = causal if host is None or host.dim() != 4 else host if host.dtype == torch.bool else host == 0
        # a row may always look at itself, so that rows of dropped tokens stay finite; they are not compared
        seen = visible(layer)
        seen = seen[:, None, None, :] if seen.dim() == 2 else seen[:, None]
        allowed = shown & seen | torch.eye(length, dtype=torch.bool)
        if not eager and key_bias is None:
            return allowed
        given = key_bias(layer) if callable(key_bias) else key_bias
        bias = 0.0 if given is None else given[:, None, None, :].to(dtype)
        return (torch.zeros(allowed.shape, dtype=dtype) + bias).masked_fill(~allowed, torch.finfo(dtype).min)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(names.POSITION_IDS) if position_ids is None else position_ids
        kwargs = {**kwargs, names.POSITION_IDS: counted if given is None else given}
        if kwargs.get(names.ATTENTION_MASK) is None:
            kwargs[names.ATTENTION_MASK] = padding.long()  # else gaps in the positions are read as packed sequences
        if replace is not None:
            embeds = kwargs[names.INPUTS_EMBEDS].clone()
            embeds[replace[0]] = replace[1].to(embeds.dtype)
            kwargs[names.INPUTS_EMBEDS] = embeds
        return args, kwargs

    def layer_hook(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            changed = {names.ATTENTION_MASK: mask(index, kwargs.get(names.ATTENTION_MASK))}
            if layer_positions is not None:
                changed[names.POSITION_EMBEDDINGS] = lm.rotary_emb(args[0], layer_positions(index))
            return (args if entering is None else (entering(index, args[0]), *args[1:])), {**kwargs, **changed}

        return hook

    def keep_hook(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            assert unchanged is not None
            rows = unchanged(index)[..., None]
            hidden = torch.where(rows, args[0], names.first_of(output))
            return names.with_first(output, hidden)

        return hook

    hooks = [lm.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(layer_hook(i), with_kwargs=True) for i, layer in enumerate(adapter.layers)
    ]
    if unchanged is not None:
        hooks += [layer.register_forward_hook(keep_hook(i)) for i, layer in enumerate(adapter.layers)]
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
