"""Sites before the LLM's input: signals out of the vision tower, and the `tower_out` stages.

The stock encoder runs unchanged. `tower_out` acts at one of two points: on what enters the projector, where each of
its tokens is a token of the LLM (the features that stay go through the projector alone, and its output is put back on
the full grid, so that packing, unpadding and placeholder counts of the host never see a different shape); or on the
encoder's output, where the host pools, shuffles or scales tokens on the way. What was decided is translated to
the LLM's slots and rides on the encoder's output object.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vtc.adapter import Adapter, Encoder
from vtc.engine.decide import run_step, stopwatch
from vtc.engine.handover import Encoded, hand_over
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.plan import Plan
from vtc.engine.vision import carried, pixels
from vtc.engine.vision import signals as tower_signals
from vtc.engine.vision import tower as tower_groups
from vtc.engine.vision.call import ENCODE, EncodeState, state_of
from vtc.engine.vision.tiles import Groups
from vtc.errors import SignalUnavailableError, UnsupportedFeatureError
from vtc.indices import shift, take
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout, Tokens


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Wrap the encoders of the model; what takes it off again goes to `undo`, step by step."""
    for encoder in adapter.encoders:
        signature = inspect.signature(getattr(adapter.inner, encoder.method))
        undo.override(adapter.inner, functools.partial(_encode, adapter, plan, encoder, signature), encoder.method)
        tower_signals.capture(encoder, {*plan.signals("tower_out"), *plan.carried}, undo)
        pixels.attach(plan, encoder, undo)
        if encoder.features is not None and (plan.at("tower_out") or plan.at("pixels") or plan.tower):
            features = functools.partial(_compress_features, adapter, plan, encoder)
            undo.before(encoder.features, features)
            undo.after(encoder.features, functools.partial(_restore_grid, encoder))
    tower_groups.attach(adapter, plan, undo)


def _encode(
    adapter: Adapter,
    plan: Plan,
    encoder: Encoder,
    signature: inspect.Signature,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In the place of the encoder's method: the stock call, and what was decided on its output."""
    if ENCODE.get() is not None:  # an encoder that calls another one
        return original(*args, **kwargs)
    arguments = names.bound(signature, args, kwargs)
    layer = arguments.get(names.FEATURE_LAYER)
    if layer not in (None, getattr(adapter.inner.config, names.FEATURE_LAYER, None)):
        raise UnsupportedFeatureError(
            f"vision_feature_layer={layer} differs from the config's, and the signals are captured at the config's "
            "layer. Set model.config.vision_feature_layer before patching."
        )
    state = EncodeState(encoder, arguments=arguments)
    token = ENCODE.set(state)
    try:
        output = original(*args, **kwargs)
    finally:
        ENCODE.reset(token)
    if not isinstance(output, tuple):
        lengths, layout = adapter.layout(encoder, output, state.arguments)
        if encoder.features is None and (plan.at("tower_out") or plan.tower):
            _compress_output(adapter, plan, state, output, lengths, layout)
        signals = carried.of_images(adapter, plan, state)
        inside = () if state.passage is None else tuple(state.passage.seconds)
        encoded = Encoded(plan, lengths, layout, state.token_map, state.seconds, inside, signals)
        hand_over(encoder.modality, output, encoded)
    return output


def _compress_features(adapter: Adapter, plan: Plan, encoder: Encoder, module: nn.Module, args: Any) -> Any:
    """Pre-hook of the projector: [G, N, D] -> [G, K, D]."""
    state = state_of(encoder)
    if state is None:
        return None
    x = args[0]
    if state.decided is not None:  # the tower ran on a smaller image, and its tokens take these places
        state.token_map, state.place = state.decided, state.decided.anchor
        state.shape = torch.Size((x.shape[0], state.decided.num_tokens, x.shape[2]))
        state.rows = list(range(x.shape[0]))
        return None
    with stopwatch(x.device) as watch:
        packing = adapter.packing(encoder, state.arguments)
        groups = Groups.of(packing, x, _square(x) if packing is None else None)
        x, total = _decide(plan, encoder, state, groups)
        if total is not None:
            state.token_map = total if packing is None else groups.to_images(total, packing)
            state.place = groups.place(total.anchor[:, : x.shape[1]])
            state.shape = args[0].shape
            state.rows = groups.rows
    state.seconds = watch.seconds
    return None if total is None else (x, *args[1:])


def _restore_grid(encoder: Encoder, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of the projector: [G, K, D'] -> [G, N, D'], features at their anchors, zeros elsewhere."""
    state = state_of(encoder)
    if state is None or state.place is None or state.shape is None:
        return None
    full = output.new_zeros(state.shape[0], state.shape[1] + 1, output.shape[2])
    # padding slots (place -1) go to an extra row in front that is cut off
    rows = torch.tensor(state.rows, device=output.device)[:, None]
    return full.index_put((rows, state.place + 1), output)[:, 1:]


def _compress_output(
    adapter: Adapter, plan: Plan, state: EncodeState, output: Any, lengths: tuple[int, ...], layout: Layout
) -> None:
    """Run the stages on the features that leave the encoder; merged ones are written in their anchors' places."""
    features = names.features_of(output)
    parts = list(features)
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if len(flat) != sum(lengths):
        raise UnsupportedFeatureError(
            f"this version of transformers adds tokens to {state.encoder.modality}s behind {state.encoder.method} "
            f"({len(flat)} features for {sum(lengths)} places), where stages at tower_out cannot see them. Update "
            "transformers, or use a method that acts at llm_in or inside the LLM."
        )
    x = nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)
    with stopwatch(x.device) as watch:
        packing = adapter.packing(state.encoder, state.arguments)
        groups = Groups.of(packing, x, layout, lengths)
        kept, total = _decide(plan, state.encoder, state, groups)
        if total is not None:
            state.token_map = total if packing is None else groups.to_images(total, packing)
    state.seconds = watch.seconds
    if total is None or total.is_selection:
        return
    rows = torch.tensor(groups.rows, device=x.device)[:, None]
    place = groups.place(total.anchor[:, : kept.shape[1]])
    full = torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]), x], dim=1).index_put((rows, place + 1), kept)[:, 1:]
    flat = torch.cat([image[:n] for image, n in zip(full, lengths, strict=True)])
    sizes = [part.numel() // part.shape[-1] for part in parts]
    pieces = [piece.reshape(part.shape) for piece, part in zip(flat.split(sizes), parts, strict=True)]
    whole = torch.stack(pieces) if isinstance(features, Tensor) else type(features)(pieces)
    setattr(output, names.FEATURES, whole)


def _decide(
    plan: Plan, encoder: Encoder, state: EncodeState, groups: Groups
) -> tuple[Float[Tensor, "G K D"], TokenMap | None]:
    """Run the stages: the features that stay and the map to them; None where the budgets cover everything."""
    x, lengths, layout = groups.x, groups.lengths, groups.layout
    total = tower_groups.decision(plan, state, groups)
    if total is not None:  # the tower wrote what it left in the places of the anchors
        lengths, anchor = total.lengths, total.anchor[:, : max(total.lengths)]
        x, layout = take(x, anchor), None if layout is None else layout.take(anchor)
    for step in plan.at("tower_out"):
        for signal in step.stage.signals:
            reason = encoder.lacks(signal.name, signal.layer)
            if reason is not None:
                raise SignalUnavailableError(
                    f"{step} reads {signal.name!r}, which {encoder.modality}s cannot give here: {reason}."
                )
        wanted = groups.budgets(step.budget, lengths, layout)
        covers_all = all(k >= n for k, n in zip(wanted, lengths, strict=True))
        if total is None and covers_all and "adaptive" not in step.method.tags:
            continue  # nothing is touched, so the features stay bit for bit
        signals = tower_signals.collect(state, groups, step.stage.signals, total)
        cls = signals.pop("cls_hidden", None)
        tokens = Tokens(x, lengths, layout, signals, budget=wanted)
        if cls is not None:
            tokens = _with_cls(tokens, cls)
        token_map = run_step(step, tokens)
        x = token_map.apply(tokens.x)
        token_map = _without_prefix(token_map, tokens.num_prefix)
        total = token_map if total is None else total.then(token_map)
        lengths = token_map.lengths
        x = x[:, : max(lengths)]
        layout = None if layout is None else layout.take(token_map.anchor[:, : max(lengths)])
    return x, total


def _square(x: Tensor) -> Layout | None:
    side = int(x.shape[1] ** 0.5)
    return Layout.grid(side, side, x.shape[0], device=x.device) if side * side == x.shape[1] else None


def _with_cls(tokens: Tokens, cls: Float[Tensor, "G 1 D"]) -> Tokens:
    """The same tokens with [CLS] in front."""
    x = torch.cat([cls, tokens.x], dim=1)
    layout = tokens.layout
    if layout is not None:
        layout = layout.map(lambda part: nn.functional.pad(part, (1, 0), value=-1))
    return Tokens(x, tokens.lengths, layout, tokens.signals, num_prefix=1, budget=tokens.budget)


def _without_prefix(token_map: TokenMap, num_prefix: int) -> TokenMap:
    """Count the anchors from the first visual token; [CLS] stays as a source only until here."""
    if not num_prefix:
        return token_map
    anchor = shift(token_map.anchor, -num_prefix)
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
