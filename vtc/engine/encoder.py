"""Sites before the LLM's input: signals out of the vision tower, and the `tower_out` stages.

The stock encoder runs unchanged up to the projector. The features that stay go through the projector alone, and its
output is put back on the full grid, so that packing, pooling and placeholder counts of the host never see a
different shape. What was decided rides on the encoder's output object.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter, Encoder
from vtc.engine.door import note_encoded
from vtc.engine.plan import Plan
from vtc.engine.state import ATTRIBUTE, ENCODE, Encoded, EncodeState, run_step, stopwatch
from vtc.engine.visual import budgets
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import attention_rows, received_attention
from vtc.stages import Signal
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout, Tokens

Undo = Callable[[], None]


def attach(adapter: Adapter, plan: Plan, undo: list[Undo]) -> None:
    """Wrap the encoders of the model; what takes it off again goes to `undo`, step by step."""
    for encoder in adapter.encoders:
        undo.append(_wrap(adapter, plan, encoder))
        steps = plan.at("tower_out")
        if not steps:
            continue
        names = {signal.name for signal in plan.signals("tower_out")}
        if names & {"cls_attention", "received_attention"}:
            undo.append(_capture(encoder.attention.query, encoder, "query"))
        if names & {"cls_attention", "received_attention", "keys"}:
            undo.append(_capture(encoder.attention.key, encoder, "key"))
        if "cls_hidden" in names:
            for i, layer in enumerate(encoder.feature_layers):
                undo.append(_capture(layer, encoder, f"hidden{i}"))
        features = functools.partial(_compress_features, adapter, plan, encoder)
        undo.append(encoder.features.register_forward_pre_hook(features).remove)
        undo.append(encoder.features.register_forward_hook(functools.partial(_restore_grid, encoder)).remove)


def _wrap(adapter: Adapter, plan: Plan, encoder: Encoder) -> Undo:
    inner = adapter.inner
    had = encoder.method in vars(inner)
    original = getattr(inner, encoder.method)

    @functools.wraps(original)  # generate reads the signature to know which inputs to hand over
    def encode(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("vision_feature_layer") not in (None, getattr(inner.config, "vision_feature_layer", None)):
            raise UnsupportedFeatureError(
                f"vision_feature_layer={kwargs['vision_feature_layer']} differs from the config's, and the signals are "
                "captured at the config's layer. Set model.config.vision_feature_layer before patching."
            )
        state = EncodeState(encoder)
        token = ENCODE.set(state)
        try:
            output = original(*args, **kwargs)
        finally:
            ENCODE.reset(token)
        if not isinstance(output, tuple):
            lengths, layout = adapter.layout(encoder, output, kwargs)
            encoded = Encoded(plan, lengths, layout, state.token_map, state.seconds)
            setattr(output, ATTRIBUTE, encoded)
            note_encoded(encoder.modality, encoded)
        return output

    setattr(inner, encoder.method, encode)

    def undo() -> None:
        if had:
            setattr(inner, encoder.method, original)
        else:
            delattr(inner, encoder.method)

    return undo


def _capture(module: nn.Module, encoder: Encoder, name: str) -> Undo:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state = ENCODE.get()
        if state is not None and state.encoder.method == encoder.method:
            state.captured[name] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_hook(hook).remove


def _compress_features(adapter: Adapter, plan: Plan, encoder: Encoder, module: nn.Module, args: Any) -> Any:
    """Pre-hook of the projector: [G, N, D] -> [G, K, D]."""
    state = ENCODE.get()
    if state is None or state.encoder.method != encoder.method:
        return None
    x = args[0]
    with stopwatch(x.device) as watch:
        lengths = (x.shape[1],) * x.shape[0]
        side = int(x.shape[1] ** 0.5)
        layout = Layout.grid(side, side, x.shape[0], device=x.device) if side * side == x.shape[1] else None
        total: TokenMap | None = None
        for step in plan.at("tower_out"):
            origin = ((args[0].shape[1],),) * x.shape[0]
            wanted = budgets(step.budget, origin, lengths, layout)
            tokens = Tokens(x, lengths, layout, _signals(state, encoder, step.stage.signals), budget=wanted)
            if any(signal.name == "cls_hidden" for signal in step.stage.signals):
                tokens = _with_cls(tokens, state, encoder)
            token_map = run_step(step, tokens)
            x = token_map.apply(tokens.x)
            token_map = _without_prefix(token_map, tokens.num_prefix)
            total = token_map if total is None else total.then(token_map)
            lengths = token_map.lengths
            x = x[:, : max(lengths)]
            layout = None if layout is None else layout.take(token_map.anchor[:, : max(lengths)])
    state.token_map, state.num_tokens, state.seconds = total, args[0].shape[1], watch.seconds
    return (x, *args[1:])


def _restore_grid(encoder: Encoder, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of the projector: [G, K, D'] -> [G, N, D'], features at their anchors, zeros elsewhere."""
    state = ENCODE.get()
    if state is None or state.encoder.method != encoder.method or state.token_map is None:
        return None
    anchor = state.token_map.anchor[:, : output.shape[1]]
    full = output.new_zeros(output.shape[0], state.num_tokens + 1, output.shape[2])
    # padding slots (anchor -1) go to an extra row in front that is cut off
    return full.scatter(1, (anchor + 1)[..., None].expand_as(output), output)[:, 1:]


def _signals(state: EncodeState, encoder: Encoder, wanted: tuple[Signal, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    attention, prefix, captured = encoder.attention, encoder.num_prefix, state.captured
    skip = prefix if encoder.drops_prefix else 0
    keys = attention.split_keys(captured["key"]) if "key" in captured else None
    for signal in wanted:
        if signal.name == "cls_attention":
            rows = attention.split_queries(captured["query"][:, :1])
            found["cls_attention"] = attention_rows(rows, keys, scale=attention.scale)[:, 0, skip:]
        elif signal.name == "received_attention":
            queries = attention.split_queries(captured["query"])
            found["received_attention"] = received_attention(queries, keys, scale=attention.scale)[:, skip:]
        elif signal.name == "keys" and keys is not None:
            has_cls = any(other.name == "cls_hidden" for other in wanted)
            found["keys"] = keys if has_cls else keys[:, :, skip:]
    return found


def _with_cls(tokens: Tokens, state: EncodeState, encoder: Encoder) -> Tokens:
    """The same tokens with the [CLS] of the feature layers in front."""
    hidden = [state.captured[f"hidden{i}"][:, :1] for i in range(len(encoder.feature_layers))]
    x = torch.cat([torch.cat(hidden, dim=-1), tokens.x], dim=1)
    layout = tokens.layout
    if layout is not None:
        parts = (nn.functional.pad(part, (1, 0), value=-1) for part in (layout.row, layout.col, layout.segment))
        layout = Layout(*parts, grids=layout.grids)
    return Tokens(x, tokens.lengths, layout, tokens.signals, num_prefix=1, budget=tokens.budget)


def _without_prefix(token_map: TokenMap, num_prefix: int) -> TokenMap:
    """Count the anchors from the first visual token; [CLS] stays as a source only until here."""
    if not num_prefix:
        return token_map
    anchor = torch.where(token_map.anchor < 0, -1, token_map.anchor - num_prefix)
    if token_map.source is None:
        return TokenMap(anchor, token_map.lengths, token_map.num_tokens - num_prefix)
    assert token_map.slot is not None and token_map.weight is not None
    from_prefix = token_map.source < num_prefix
    return TokenMap(
        anchor,
        token_map.lengths,
        token_map.num_tokens - num_prefix,
        (token_map.source - num_prefix).clamp(min=0),
        torch.where(from_prefix, -1, token_map.slot),
        token_map.weight,
        token_map.mass,
    )
