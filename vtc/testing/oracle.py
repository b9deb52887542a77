"""The oracle: dropping tokens while keeping their positions equals the full model with their keys masked.

It shares no code with the engine: the stock model runs on all tokens, with explicit masks handed to each layer. What
the host itself hides or shows (padding, bidirectional image blocks, sliding windows) stays as it is.
"""

import functools
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
    masked = _Masked(lm, padding, visible, replace, position_ids, key_bias, layer_positions, entering)
    hooks = [lm.register_forward_pre_hook(masked.enter, with_kwargs=True)]
    for index, layer in enumerate(adapter.layers):
        hook = functools.partial(masked.enter_layer, index)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if unchanged is not None:
            hooks.append(layer.register_forward_hook(functools.partial(_leave_layer, unchanged, index)))
    try:
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Masked:
    """What the language model and its layers get in place of what the host hands them; see `masked_logits`."""

    lm: Any
    padding: Tensor  # [B, S], False in padding
    visible: Visible
    replace: tuple[Tensor, Tensor] | None
    position_ids: Tensor | None
    key_bias: Tensor | Visible | None
    layer_positions: Visible | None
    entering: Callable[[int, Tensor], Tensor] | None

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the language model: positions, the padding mask, replaced rows."""
        given = kwargs.get(names.POSITION_IDS) if self.position_ids is None else self.position_ids
        counted = (self.padding.long().cumsum(1) - 1).clamp(min=0)
        kwargs = {**kwargs, names.POSITION_IDS: counted if given is None else given}
        if kwargs.get(names.ATTENTION_MASK) is None:
            # else gaps in the positions are read as packed sequences
            kwargs[names.ATTENTION_MASK] = self.padding.long()
        if self.replace is not None:
            embeds = kwargs[names.INPUTS_EMBEDS].clone()
            embeds[self.replace[0]] = self.replace[1].to(embeds.dtype)
            kwargs[names.INPUTS_EMBEDS] = embeds
        return args, kwargs

    def enter_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Pre-hook of layer `index`: its mask, rotations and states."""
        changed = {names.ATTENTION_MASK: self.mask(index, kwargs.get(names.ATTENTION_MASK))}
        if self.layer_positions is not None:
            changed[names.POSITION_EMBEDDINGS] = self.lm.rotary_emb(args[0], self.layer_positions(index))
        if self.entering is not None:
            args = (self.entering(index, args[0]), *args[1:])
        return args, {**kwargs, **changed}

    def mask(self, layer: int, host: Tensor | None) -> Tensor:
        """What the host shows and `visible` too: bool, or additive where attention is eager or keys have a bias."""
        order = torch.arange(self.padding.shape[1])
        causal = (order <= order[:, None]) & self.padding[:, None, None, :]
        shown = causal if host is None or host.dim() != 4 else host if host.dtype == torch.bool else host == 0
        # a row may always look at itself, so that rows of dropped tokens stay finite; they are not compared
        seen = self.visible(layer)
        seen = seen[:, None, None, :] if seen.dim() == 2 else seen[:, None]
        allowed = shown & seen | torch.eye(len(order), dtype=torch.bool)
        if names.attention_of(self.lm.config) != "eager" and self.key_bias is None:
            return allowed
        dtype = next(self.lm.parameters()).dtype
        given = self.key_bias(layer) if callable(self.key_bias) else self.key_bias
        bias = 0.0 if given is None else given[:, None, None, :].to(dtype)
        return (torch.zeros(allowed.shape, dtype=dtype) + bias).masked_fill(~allowed, torch.finfo(dtype).min)


def _leave_layer(unchanged: Visible, index: int, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of layer `index`: the rows that it leaves as they were."""
    hidden = torch.where(unchanged(index)[..., None], args[0], names.first_of(output))
    return names.with_first(output, hidden)


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
