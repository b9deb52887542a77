"""The LLM's door: `llm_in` stages, and the gather after which the sequence is truly short.

Three hooks: the inner model's entry notes the prompt, the language model's entry drops, its exit restores the shape
of the hidden states (a dropped place repeats the last kept place before it, so logits and labels of the host still
line up) and files what each layer holds on the KV cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.decide import stopwatch
from vtc.engine.handover import ATTRIBUTE, COLLECTED
from vtc.engine.host import cache as host
from vtc.engine.host import contract, masks, names
from vtc.engine.host.override import Undo
from vtc.engine.llm import carried, unmerge
from vtc.engine.llm import signals as layer_signals
from vtc.engine.llm import sizes as size_bias
from vtc.engine.llm.evict import evict
from vtc.engine.llm.forward import FORWARD, NO_OUTER, OUTER, Forward, LayerState, Outer, inverse_columns, take
from vtc.engine.llm.held import READING, Held, Memory, check_cache, memory_of, remember
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan, Step
from vtc.errors import InputError, StateError, UnsupportedFeatureError

Record = Callable[[Forward], None]


def attach(adapter: Adapter, plan: Plan, record: Record, undo: Undo) -> None:
    """Hook the inner model and the language model; what takes the hooks off again goes to `undo`."""
    inner, lm = adapter.inner, adapter.language_model
    # always_call: also when the forward raised, so that no state survives it
    undo.before(adapter.model, functools.partial(_enter_outer, adapter), with_kwargs=True)
    undo.after(adapter.model, _leave_outer, always_call=True)
    undo.before(inner, functools.partial(_enter, adapter, plan), with_kwargs=True)
    undo.after(inner, functools.partial(_check_seen, adapter))
    undo.after(inner, _leave, always_call=True)
    undo.before(lm, functools.partial(_compress, adapter, plan), with_kwargs=True)
    undo.after(lm, functools.partial(_restore, adapter, plan, record), with_kwargs=True)


def _enter_outer(adapter: Adapter, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of the outer model: assisted decoding asks for one more row of logits than it guessed tokens.

    Only `generate` encodes ahead; a user who scores an answer with logits_to_keep hands over pixels.
    """
    rows, outputs = kwargs.get(names.LOGITS_TO_KEEP), kwargs.get(names.ENCODER_OUTPUTS) or {}
    guessed = rows - 1 if isinstance(rows, int) and rows > 1 and outputs else 0
    if guessed and adapter.bidirectional_prompt:
        raise UnsupportedFeatureError(
            f"assisted decoding of {adapter.family}: the whole prompt of this model sees itself, and with it the "
            f"{guessed} tokens that the assistant guessed, so the answer would differ from the one without assistant "
            "(in the unpatched model, too). Call generate without assistant_model and prompt_lookup_num_tokens."
        )
    OUTER.set(Outer(guessed, {name: getattr(output, ATTRIBUTE, None) for name, output in outputs.items()}))


def _enter(adapter: Adapter, plan: Plan, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the inner model."""
    _clear()
    given = names.arguments_of(module, args, kwargs)
    embeds = given.get(names.INPUTS_EMBEDS)
    if given.get(names.INPUT_IDS) is None and embeds is not None and embeds.shape[1] > 1:
        raise _without_ids()
    state = Forward(plan, given.get(names.INPUT_IDS), candidates=OUTER.get().candidates)
    outputs = given.get(names.ENCODER_OUTPUTS) or {}
    for encoder in adapter.encoders:
        output = outputs.get(encoder.modality)
        if output is None:
            continue
        encoded = getattr(output, ATTRIBUTE, None) or OUTER.get().encoded.get(encoder.modality)
        if encoded is None:
            raise StateError(
                "mm_encoder_outputs were encoded before the patch, or cut into pieces by prefill_chunk_size, so it is "
                "unknown what was decided about them. Encode under the patch, and prefill in one piece."
            )
        if encoded.plan is not plan:
            raise StateError("mm_encoder_outputs were encoded under another patch. Encode the images again.")
        state.encoded[encoder.modality] = encoded
    if adapter.masks_outside:
        kwargs = _cut_outer_mask(module, plan, state, given, kwargs)
    state.token = FORWARD.set(state)
    COLLECTED.set(state.encoded)
    return args, kwargs


def _cut_outer_mask(
    module: nn.Module, plan: Plan, state: Forward, given: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The inner model's arguments with a 2-D mask of what layer 0 holds; it sizes the masks of the layers by that."""
    mask, (_, cache) = given.get(names.ATTENTION_MASK), names.find_cache(module, given)
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        raise UnsupportedFeatureError(
            "masks that are built before the model is called (cache_implementation='static', or a 4-D attention_mask) "
            "have the shape of the uncompressed prompt. Pass the 2-D attention_mask and use the default cache."
        )
    state.mask = mask
    tokens = given[names.INPUTS_EMBEDS] if state.input_ids is None else state.input_ids
    memory = memory_of(cache, plan, tokens.shape[0]) if cache is not None else None
    READING.set(memory)
    if memory is None:
        return kwargs
    dense = host.held_length(cache, plan.reference) - memory.entries
    past = memory.length + dense
    new = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    columns = torch.cat([memory.column(plan.reference, dense).to(tokens.device), new], dim=1)
    types = given.get(names.TOKEN_TYPES)
    if types is not None and types.shape[1] == past + tokens.shape[1]:
        # they say which keys belong to the same image; padding is hidden by the mask
        kwargs = {**kwargs, names.TOKEN_TYPES: types.gather(1, columns.clamp(min=0).to(types.device))}
    if mask is None:
        return {**kwargs, names.ATTENTION_MASK: (columns >= 0).long()} if memory.reference.ragged else kwargs
    _check_width(mask, past, tokens.shape[1])
    return {**kwargs, names.ATTENTION_MASK: masks.cut(mask, None, columns)}


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _clear()


def _check_seen(adapter: Adapter, module: nn.Module, args: Any, output: Any) -> None:
    """Hook of the inner model, not called when it raised: what was encoded must have come to the language model."""
    state = FORWARD.get()
    if state is not None and state.encoded and state.visual is None:
        raise StateError(
            f"{type(module).__name__} encoded {' and '.join(f'{name}s' for name in state.encoded)}, and its "
            f"{type(adapter.language_model).__name__} was never called with them, so nothing was compressed. "
            f"{contract.REPORT_IT}"
        )


def _leave_outer(module: nn.Module, args: Any, output: Any) -> None:
    OUTER.set(NO_OUTER)


def _clear() -> None:
    state = FORWARD.get()
    if state is not None and state.token is not None:
        FORWARD.reset(state.token)
    COLLECTED.set(None)
    READING.set(None)


def _compress(adapter: Adapter, plan: Plan, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the language model."""
    state = FORWARD.get()
    embeds = kwargs.get(names.INPUTS_EMBEDS)
    if state is None:
        return None
    if embeds is None:
        raise StateError(f"{type(module).__name__} was called without {names.INPUTS_EMBEDS!r}. {contract.REPORT_IT}")
    _, cache = names.find_cache(module, kwargs)
    state.batch, state.length = embeds.shape[:2]
    state.device = embeds.device
    state.cache = cache
    state.memory = memory_of(cache, plan, state.batch) if cache is not None else None
    READING.set(state.memory)
    if not state.encoded:
        _check_placeholders(adapter, state)
    if not state.encoded and state.memory is None:
        _check_plain(adapter, state, kwargs)
        return None
    check_cache(cache)
    if module.training and names.checkpoints(adapter.layers[0]):
        raise UnsupportedFeatureError(
            "gradient checkpointing runs layers twice, the second time without the state of this forward. "
            "Turn it off while the model is patched."
        )
    state.held = host.held_length(cache, plan.reference) if cache is not None else 0
    if state.memory is not None:
        state.dense = state.held - state.memory.entries
        state.past = state.memory.length + state.dense
    else:
        state.past = state.held
    if state.encoded and state.past and contract.is_older(adapter.later_pixels_since):
        raise UnsupportedFeatureError(
            f"{adapter.family} on transformers {contract.installed()}: the stock model reads pixels that come on a KV "
            "cache unlike the same conversation in one piece, so the answer would be wrong. Prefill the whole "
            f"conversation without a cache, or install transformers {adapter.later_pixels_since} or newer."
        )
    kwargs = dict(kwargs)
    window = adapter.window
    if window is not None and state.past + state.length > window:
        raise UnsupportedFeatureError(
            f"{state.past + state.length} tokens are more than the {window} that this model's sliding-window layers "
            "see, and a window over a shortened cache would see other tokens. Keep prompt and answer together within "
            f"{window} tokens, or use a model without sliding windows."
        )
    mask = kwargs.get(names.ATTENTION_MASK)
    _note_valid(state, state.mask if adapter.masks_outside else mask)
    positions = _full_positions(state, kwargs.get(names.POSITION_IDS))
    if state.encoded:
        with stopwatch(embeds.device) as watch:
            embeds, located = _decide(adapter, plan, state, embeds)
        state.seconds += [("llm_in", watch), *(("tower_out", encoded) for encoded in state.encoded.values())]
        state.seconds += [timed for encoded in state.encoded.values() for timed in encoded.tower_seconds]
        kwargs.update(adapter.cut_visual(kwargs, functools.partial(_cut_columns, state, located)))
    if plan.positions != "original":
        positions = _compact_positions(state, positions)
    if state.column is not None:
        embeds = take(embeds, state.column)
        positions = take(positions, state.column, dim=-1)
    if plan.positions == "renumber":
        valid_rows = state.valid_rows().long()
        state.positions, state.door_rank = positions, valid_rows.cumsum(1) - valid_rows
        state.door_valid = valid_rows.sum(1)
    state.door_column, state.door_row_of, state.door_ragged = state.column, state.row_of, state.ragged
    kwargs[names.INPUTS_EMBEDS] = embeds
    kwargs[names.POSITION_IDS] = positions
    kwargs[names.ATTENTION_MASK] = _door_mask(adapter, state, mask, embeds)
    return args, kwargs


def _check_placeholders(adapter: Adapter, state: Forward) -> None:
    """A prompt without encoded images must not hold placeholders: the host would read them as text."""
    if state.input_ids is None or state.length == 1:
        return
    placeholders = torch.tensor([encoder.placeholder_id for encoder in adapter.encoders], device=state.input_ids.device)
    if torch.isin(state.input_ids, placeholders).any():
        raise InputError(
            "the prompt holds image placeholders, but no images came with it. Pass pixel_values with the prompt; "
            "prefill_chunk_size drops them: prefill in one piece; and leave an assistant_model unpatched: generate "
            "hands it no images."
        )


def _note_valid(state: Forward, mask: Any) -> None:
    """Remember which columns are padding of the prompt."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    _check_width(mask, state.past, state.length)
    valid = mask.to(state.device).bool()
    state.past_valid, state.valid = valid[:, : state.past], valid[:, state.past :]


def _check_width(mask: Tensor, past: int, length: int) -> None:
    """Refuse a 2-D mask of another width than the conversation.

    Raises:
        InputError: in a prefill.
        StateError: on a cache; the mask may be wrong, or the cache may have lost what vtc noted on it.
    """
    if mask.shape[1] == past + length:
        return
    what = (
        f"attention_mask covers {mask.shape[1]} columns, the prompt has {past + length} ({past} of them in the cache)"
    )
    if not past:
        raise InputError(f"{what}. Pass the mask of the whole conversation.")
    raise StateError(
        f"{what}. Pass the mask of the whole conversation; if you did, the KV cache holds fewer entries than it stands "
        "for and has lost what vtc noted on it (copied tensor by tensor?): prefill again."
    )


def _check_plain(adapter: Adapter, state: Forward, kwargs: dict[str, Any]) -> None:
    """A call in which nothing is compressed, and whose cache, if there is one, must then be whole.

    Raises:
        StateError: layers hold different numbers of entries, or a mask or positions have another width.
    """
    _check_positions(state, kwargs.get(names.POSITION_IDS))
    if state.cache is None or host.is_static(state.cache):
        return
    if not host.is_whole(state.cache):
        raise StateError(
            "the layers of this KV cache hold different numbers of entries, so tokens were dropped from it, and what "
            "vtc noted on it is gone (copied tensor by tensor?). Prefill again, and pass on the cache itself."
        )
    mask = state.mask if adapter.masks_outside else kwargs.get(names.ATTENTION_MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        _check_width(mask, host.held_length(state.cache), state.length)


def _check_positions(state: Forward, positions: Tensor | None) -> None:
    if positions is not None and positions.shape[-1] != state.length:
        raise StateError(
            f"the language model got positions for {positions.shape[-1]} tokens and embeddings of {state.length}. "
            "Positions come from position_ids, or, where the model counts them itself (Qwen-VL), from attention_mask: "
            "pass those of the new tokens, or leave them out."
        )


def _full_positions(state: Forward, positions: Tensor | None) -> Tensor:
    """Positions of the uncompressed prompt, with a batch dimension."""
    _check_positions(state, positions)
    if positions is None:
        return state.arange(state.length, state.past)
    return positions.expand(*positions.shape[:-2], state.batch, -1)


def _decide(adapter: Adapter, plan: Plan, state: Forward, embeds: Tensor) -> tuple[Tensor, Visual]:
    """Everything up to the gather: locate the visual tokens, follow the tower's maps, run the `llm_in` stages."""
    if state.input_ids is None:
        raise _without_ids()
    visual, located = _locate(adapter, state, embeds.device)
    state.layout = located.layout
    carried.note_text(plan, state)
    for step in plan.at("llm_in"):
        if step.stage.pool == "sample":
            visual = visual.pooled()
        signals = {**_text_signals(step, state, visual, embeds), **carried.collect(step, state, visual)}
        tokens = visual.tokens(embeds, step.budget, signals, schedule=step.stage.schedule)
        visual, embeds = visual.decide(step, tokens, embeds, state.row_of)
    state.visual = visual
    layer_signals.note_door(plan, state, visual, embeds)
    state.visual_lengths[0] = visual.per_sample(state.batch)
    if any(have != sum(images) for have, images in zip(visual.lengths, visual.origin, strict=True)):
        if plan.unmerge:
            embeds = unmerge.begin(state, located, embeds)
        else:
            state.shorten()
    return embeds, located


def _without_ids() -> InputError:
    return InputError(
        "inputs_embeds without input_ids: the places of the visual tokens are read from the ids. "
        "Pass input_ids (and pixel_values or mm_encoder_outputs)."
    )


def _locate(adapter: Adapter, state: Forward, device: torch.device) -> tuple[Visual, Visual]:
    """The visual tokens of all modalities: those that are left after the tower, and all of them, in prompt order."""
    assert state.input_ids is not None
    places = [(state.input_ids == encoder.placeholder_id).to(device) for encoder in adapter.encoders]
    state.is_visual = torch.stack(places).any(0)
    valid = torch.ones_like(state.is_visual) if state.valid is None else state.valid
    # the one wait for the device in a prefill: how many placeholders and valid columns each prompt has
    *counts, state.valid_counts = torch.stack([*(place.sum(1) for place in places), valid.sum(1)]).tolist()
    located, left = [], []
    for encoder, place, count in zip(adapter.encoders, places, counts, strict=True):
        encoded = state.encoded.get(encoder.modality)
        if encoded is None:
            if any(count):
                raise InputError(
                    f"the prompts hold {sum(count)} {encoder.modality} placeholders, but no {encoder.modality}s came "
                    "with them. Pass the pixels of everything that the prompts name."
                )
            continue
        whole, images = Visual.locate(place, encoded.lengths, encoded.layout, count, encoder.modality)
        carried.locate(state, encoder, encoded, whole, images)
        located.append(whole)
        token_map = encoded.token_map
        left.append(whole if token_map is None else whole.follow(token_map.groups(images)))
    if len(located) == 1:
        return left[0], located[0]
    # images and videos in one prompt: a second wait says which of them comes first
    first = torch.cat([whole.column[:, 0] for whole in located]).tolist()
    sample = [row for whole in located for row in whole.sample]
    order = sorted(range(len(first)), key=lambda group: (sample[group], first[group]))
    return Visual.join(left, order), Visual.join(located, order)


def _cut_columns(state: Forward, located: Visual, dense: Tensor) -> Tensor:
    """Rows [B, S, D] of the whole prompt, merged and gathered like the embeddings."""
    visual = state.visual
    assert visual is not None
    if not visual.token_map.is_selection:
        whole = located if len(located.sample) == len(visual.sample) else located.pooled()
        values = visual.token_map.apply(whole.gather(dense))[:, : visual.column.shape[1]]
        dense = visual.scatter(dense, values.to(dense.dtype))
    if state.column is None:
        return dense
    return take(dense, state.column).masked_fill((state.column < 0)[..., None], 0)


def _text_signals(step: Step, state: Forward, visual: Visual, embeds: Tensor) -> dict[str, Tensor]:
    if not any(signal.name in ("text_embeds", "text_after") for signal in step.stage.signals):
        return {}
    assert state.is_visual is not None
    is_text = ~state.is_visual & state.read_rows()  # nothing was gathered yet: rows are columns
    # text tokens first, in order; this width holds the longest text, without asking the device
    width = state.length - min(visual.per_sample(state.batch, [sum(images) for images in visual.origin]))
    order = (~is_text).long().argsort(dim=1, stable=True)[:, :width]
    rows = visual.sample_index
    return {
        "text_embeds": take(embeds, order)[rows],
        "text_mask": is_text.gather(1, order)[rows],
        "text_after": order[rows] > visual.column.max(dim=1, keepdim=True).values,
    }


def _compact_positions(state: Forward, positions: Tensor) -> Tensor:
    """Positions with the gaps of dropped columns closed, here and in earlier turns."""
    if positions.dim() != 2:
        raise UnsupportedFeatureError(
            "closing gaps between positions has no meaning for M-RoPE, whose positions are places on the image. "
            "Use positions='original'."
        )
    shift = state.memory.shift if state.memory is not None else None
    if shift is not None:
        positions = positions - shift[:, None]
    if state.row_of is None:
        return positions
    dropped = (state.row_of < 0).long()
    state.shift = dropped.sum(1) if shift is None else dropped.sum(1) + shift
    return positions - (dropped.cumsum(1) - dropped)


def _door_mask(adapter: Adapter, state: Forward, mask: Any, embeds: Tensor) -> Any:
    """The mask argument for what layer 0 holds and sees."""
    new, memory = state.columns(), state.memory
    if adapter.masks_outside:  # what the cache holds was cut before the masks were built
        held, past = state.arange(state.held), state.held
    else:
        held = memory.column(state.plan.reference, state.dense) if memory is not None else state.arange(state.past)
        past = state.past
    columns = torch.cat([held, torch.where(new < 0, -1, new + past)], dim=1)
    ragged = state.ragged or (memory is not None and memory.reference.ragged)
    implementation = names.attention_of(adapter.text_config)
    for part in mask.values() if isinstance(mask, dict) else (mask,):
        masks.check_width(part, past + state.length, state.length)
    if isinstance(mask, dict):
        # these go to the layers as they are, so None is plain causal over all rows
        whole = masks.causal(columns >= 0, new.shape[1], embeds.dtype, implementation) if ragged else None
        return {name: whole if part is None else masks.cut(part, new, columns) for name, part in mask.items()}
    if mask is None and (ragged or state.cache is None):
        # without a mask and without a cache, gaps in position_ids would be read as packed sequences
        mask = (columns >= 0).long()
    elif mask is not None:
        mask = masks.cut(mask, new, columns)
    return mask


def _restore(
    adapter: Adapter, plan: Plan, record: Record, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    """Hook of the language model: full-length hidden states, and the cache's memory."""
    state = FORWARD.get()
    word, given = names.find_cache(module, kwargs)
    cache = names.cache_of(output)
    if state is not None and not word and (state.visual is not None or cache is not None):
        raise StateError(
            f"{type(module).__name__} was called without a KV cache by a word that vtc knows "
            f"({' or '.join(names.CACHE_WORDS)}), so what was dropped could not be noted on it and every later token "
            f"would be wrong. {contract.REPORT_IT}"
        )
    if state is None or state.visual is None:
        return None
    record(state)
    if state.unmerging is not None:
        return unmerge.restore(output)
    cache = given if cache is None else cache
    # frozen and parked tokens change what single layers hold, though every row is back here
    shortened = state.column is not None or any(seen.column is not None for seen in state.layer_state.values())
    shortened = shortened or (plan.size_bias and not state.visual.token_map.is_selection)
    if cache is not None and shortened:
        remember(cache, evict(cache, plan, state, _written(adapter, plan, state)))
    if state.column is None:
        return None
    keep = inverse_columns(state.column, state.length) >= 0
    padding = (state.column < 0).sum(1, keepdim=True)
    # every column reads the row of the last kept column at or before it
    row = (keep.long().cumsum(1) - 1 + padding).clamp(min=0)
    return names.with_last_hidden(output, take(output[0], row))


def _written(adapter: Adapter, plan: Plan, state: Forward) -> Memory:
    """What each layer holds after this call."""
    memory = state.memory
    made: dict[tuple[int, ...], Held] = {}
    layers = []
    at_door = LayerState(state.door_column, None, state.door_ragged)
    for index in range(len(adapter.layers)):
        seen = state.layer_state.get(index, at_door)
        before = memory.layers[index] if memory is not None else None
        key = id(seen.column), id(before), id(seen.shift), id(seen.visual)
        if key not in made:
            made[key] = _joined(state, index, seen)
        layers.append(made[key])
    shift = state.shift if state.shift is not None else (memory.shift if memory is not None else None)
    return Memory(plan, state.past + state.length, tuple(layers), shift)


def _joined(state: Forward, index: int, seen: LayerState) -> Held:
    """The entries of layer `index` before this call, followed by its new ones."""
    new = state.arange(state.length) if seen.column is None else seen.column
    logical = torch.where(new < 0, -1, new + state.past)
    memory = state.memory
    if memory is None:
        before, held, held_place = None, state.arange(state.past), None
    else:
        before = memory.layers[index]
        held, held_place = memory.column(index, state.dense), memory.place(index, state.dense)
    bias = size_bias.of_layer(state, index, seen)
    joined = torch.cat([held, logical], dim=1)
    ragged = seen.ragged or (before is not None and before.ragged)
    place = seen.place
    if place is None and held_place is None:
        return Held(joined, None, ragged, seen.shift, bias)
    if held_place is None:
        held_place = state.arange(state.held)
    if place is None:
        place = state.arange(new.shape[1])
    places = torch.cat([held_place, torch.where(place < 0, -1, place + state.held)], dim=1)
    return Held(joined, places, ragged, seen.shift, bias)
