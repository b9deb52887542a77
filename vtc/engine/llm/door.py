"""The LLM's door: `llm_in` stages, and the gather after which the sequence is truly short.

Three hooks: the outer model's entry notes what assisted decoding guessed, the inner model's entry what was encoded, and
the language model's entry drops. What leaves is `vtc.engine.llm.exit`'s.
"""

import functools
from dataclasses import replace
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
from vtc.engine.llm import signals as llm_signals
from vtc.engine.llm.forward import FORWARD, NO_OUTER, OUTER, Forward, Outer
from vtc.engine.llm.logical import READING, check_cache, recall
from vtc.engine.llm.prompt import Prompt, check_width
from vtc.engine.llm.rows import Rows
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan
from vtc.errors import InputError, StateError, UnsupportedFeatureError
from vtc.indices import shift, take, take_positions
from vtc.tokens import Medium


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Hook the models' entries, and what clears the state of a call; what takes the hooks off again goes to `undo`."""
    inner, lm = adapter.inner, adapter.language_model
    # always_call: also when the forward raised, so that no state survives it
    undo.before(adapter.model, functools.partial(_enter_outer, adapter), with_kwargs=True)
    undo.after(adapter.model, _leave_outer, always_call=True)
    undo.before(inner, functools.partial(_enter, adapter, plan), with_kwargs=True)
    undo.after(inner, functools.partial(_check_seen, adapter))
    undo.after(inner, _leave, always_call=True)
    undo.before(lm, functools.partial(_compress, adapter, plan), with_kwargs=True)


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
    FORWARD.set(state)
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
    tokens = given[names.INPUTS_EMBEDS] if state.ids is None else state.ids
    memory = recall(cache, plan, tokens.shape[0])
    if memory is None:
        return kwargs
    past = memory.length
    new = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    columns = torch.cat([memory.reference.columns.to(tokens.device), new], dim=1)
    types = given.get(names.TOKEN_TYPES)
    if types is not None and types.shape[1] == past + tokens.shape[1]:
        # they say which keys belong to the same image; padding is hidden by the mask
        kwargs = {**kwargs, names.TOKEN_TYPES: take(types, columns)}
    if mask is None:
        return {**kwargs, names.ATTENTION_MASK: (columns >= 0).long()} if memory.reference.ragged else kwargs
    check_width(mask, past, tokens.shape[1])
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
    FORWARD.set(None)
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
    mask, positions = kwargs.get(names.ATTENTION_MASK), kwargs.get(names.POSITION_IDS)
    flat = state.mask if adapter.masks_outside else mask  # the 2-D one, if there is one
    prompt = _prompt(plan, state, cache, embeds)
    if not state.encoded:
        prompt.check_placeholders([encoder.placeholder_id for encoder in adapter.encoders])
    if not state.encoded and prompt.memory is None:
        prompt.check_plain(positions, flat)
        return None
    _check(adapter, state, prompt, module)
    prompt = _with_valid(prompt, flat)
    prompt.check_positions(positions)
    positions = _full_positions(prompt, positions)
    kwargs = dict(kwargs)
    state.prompt, state.rows = prompt, Rows(prompt)
    if state.encoded:
        with stopwatch(embeds.device) as watch:
            embeds, located = _decide(adapter, plan, state, embeds)
        state.seconds += [("llm_in", watch), *(("tower_out", encoded) for encoded in state.encoded.values())]
        state.seconds += [timed for encoded in state.encoded.values() for timed in encoded.tower_seconds]
        kwargs.update(adapter.cut_visual(kwargs, functools.partial(_cut_columns, state.rows, located)))
    if plan.positions != "original":
        positions, state.shift = _compact_positions(state.rows, positions)
    if state.rows.column is not None:
        embeds = take(embeds, state.rows.column)
        positions = take_positions(positions, state.rows.column)
    state.door, state.positions = state.rows, positions
    kwargs[names.INPUTS_EMBEDS] = embeds
    kwargs[names.POSITION_IDS] = positions
    kwargs[names.ATTENTION_MASK] = _door_mask(adapter, plan, state.rows, mask, embeds)
    return args, kwargs


def _prompt(plan: Plan, state: Forward, cache: Any, embeds: Tensor) -> Prompt:
    """The new tokens; from here on the running call may read what was noted on the cache."""
    batch, length = embeds.shape[:2]
    memory = recall(cache, plan, batch)
    given = Prompt(batch, length, embeds.device, cache, ids=state.ids, candidates=state.candidates)
    if not state.encoded and memory is None:
        return given
    check_cache(cache)
    if memory is not None:
        return replace(given, memory=memory, past=memory.length, held=memory.reference.entries)
    held = host.held_length(cache, plan.reference) if cache is not None else 0
    return replace(given, past=held, held=held)


def _check(adapter: Adapter, state: Forward, prompt: Prompt, module: nn.Module) -> None:
    """What cannot be compressed, or not be continued.

    Raises:
        UnsupportedFeatureError: it cannot.
    """
    if module.training and names.checkpoints(adapter.layers[0]):
        raise UnsupportedFeatureError(
            "gradient checkpointing runs layers twice, the second time without the state of this forward. "
            "Turn it off while the model is patched."
        )
    if state.encoded and prompt.past and contract.is_older(adapter.later_pixels_since):
        raise UnsupportedFeatureError(
            f"{adapter.family} on transformers {contract.installed()}: the stock model reads pixels that come on a KV "
            "cache unlike the same conversation in one piece, so the answer would be wrong. Prefill the whole "
            f"conversation without a cache, or install transformers {adapter.later_pixels_since} or newer."
        )
    window, total = adapter.window, prompt.past + prompt.length
    if window is not None and total > window:
        raise UnsupportedFeatureError(
            f"{total} tokens are more than the {window} that this model's sliding-window layers see, and a window over "
            "a shortened cache would see other tokens. Keep prompt and answer together within "
            f"{window} tokens, or use a model without sliding windows."
        )


def _with_valid(prompt: Prompt, mask: Any) -> Prompt:
    """The same, which knows what is padding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return prompt
    check_width(mask, prompt.past, prompt.length)
    return replace(prompt, valid=mask.to(prompt.device).bool()[:, prompt.past :])


def _full_positions(prompt: Prompt, positions: Tensor | None) -> Tensor:
    """Positions of the uncompressed prompt, with a batch dimension."""
    if positions is None:
        return prompt.arange(prompt.length, prompt.past)
    return positions.expand(*positions.shape[:-2], prompt.batch, -1)


def _decide(adapter: Adapter, plan: Plan, state: Forward, embeds: Tensor) -> tuple[Tensor, Visual]:
    """Everything up to the gather: locate the visual tokens, follow the tower's maps, run the `llm_in` stages."""
    visual, located = _locate(adapter, state)
    assert state.prompt is not None
    rows = Rows(state.prompt, visual)
    carried.note_text(plan, state)
    for step in plan.at("llm_in"):
        if step.stage.pool == "sample":
            visual = visual.pooled()
        signals = llm_signals.collect(step, llm_signals.Moment(adapter, state, rows, visual, embeds))
        tokens = visual.tokens(embeds, step.budget, signals, schedule=step.stage.count)
        visual, embeds = visual.decide(step, tokens, embeds)
        rows = rows.with_visual(visual)
    state.rows = rows
    llm_signals.note_door(plan, state, visual, embeds)
    state.note_lengths(0)
    if any(have != sum(images) for have, images in zip(visual.lengths, visual.origin, strict=True)):
        if plan.unmerge:
            embeds = unmerge.begin(state, located, embeds)
        else:
            state.rows = rows.cut()
    return embeds, located


def _without_ids() -> InputError:
    return InputError(
        "inputs_embeds without input_ids: the places of the visual tokens are read from the ids. "
        "Pass input_ids (and pixel_values or mm_encoder_outputs)."
    )


def _locate(adapter: Adapter, state: Forward) -> tuple[Visual, Visual]:
    """The visual tokens of all modalities: those that are left after the tower, and all of them, in prompt order."""
    prompt = state.prompt
    assert prompt is not None
    if prompt.ids is None:
        raise _without_ids()
    places = [(prompt.ids == encoder.placeholder_id).to(prompt.device) for encoder in adapter.encoders]
    is_visual = torch.stack(places).any(0)
    valid = torch.ones_like(is_visual) if prompt.valid is None else prompt.valid
    # the one wait for the device in a prefill: how many placeholders and valid columns each prompt has
    *counts, valid_counts = torch.stack([*(place.sum(1) for place in places), valid.sum(1)]).tolist()
    state.prompt = replace(prompt, is_visual=is_visual, valid_counts=tuple(valid_counts))
    located, left = [], []
    media: list[Medium] = []
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
        media += map(Medium, [encoder.modality] * len(images), images, whole.sample, whole.lengths)
        token_map = encoded.token_map
        left.append(whole if token_map is None else whole.follow(token_map.groups(images)))
    if len(located) == 1:
        visual, whole = left[0], located[0]
    else:
        # images and videos in one prompt: a second wait says which of them comes first
        first = torch.cat([part.column[:, 0] for part in located]).tolist()
        sample = [row for part in located for row in part.sample]
        order = sorted(range(len(first)), key=lambda group: (sample[group], first[group]))
        visual, whole = Visual.join(left, order), Visual.join(located, order)
        media = [media[i] for i in order]
    state.prompt = replace(state.prompt, layout=whole.layout, media=tuple(media))
    return visual, whole


def _cut_columns(rows: Rows, located: Visual, dense: Tensor) -> Tensor:
    """Rows [B, S, D] of the whole prompt, merged and gathered like the embeddings."""
    visual = rows.visual
    assert visual is not None
    if not visual.token_map.is_selection:
        whole = located if len(located.sample) == len(visual.sample) else located.pooled()
        values = visual.token_map.apply(whole.gather(dense))[:, : visual.column.shape[1]]
        dense = visual.scatter(dense, values.to(dense.dtype))
    if rows.column is None:
        return dense
    return take(dense, rows.column).masked_fill((rows.column < 0)[..., None], 0)


def _compact_positions(rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions with the gaps of dropped columns closed, here and in earlier turns; how far what follows moves."""
    if positions.dim() != 2:
        raise UnsupportedFeatureError(
            "closing gaps between positions has no meaning for M-RoPE, whose positions are places on the image. "
            "Use positions='original'."
        )
    memory = rows.prompt.memory
    shift = memory.shift if memory is not None else None
    if shift is not None:
        positions = positions - shift[:, None]
    if rows.row_of is None:
        return positions, shift
    dropped = (rows.row_of < 0).long()
    moved = dropped.sum(1) if shift is None else dropped.sum(1) + shift
    return positions - (dropped.cumsum(1) - dropped), moved


def _door_mask(adapter: Adapter, plan: Plan, rows: Rows, mask: Any, embeds: Tensor) -> Any:
    """The mask argument for what layer 0 holds and sees."""
    prompt, new = rows.prompt, rows.columns
    memory = prompt.memory
    if adapter.masks_outside:  # what the cache holds was cut before the masks were built
        held, past = prompt.arange(prompt.held), prompt.held
    else:
        held = memory.reference.columns if memory is not None else prompt.arange(prompt.past)
        past = prompt.past
    columns = torch.cat([held, shift(new, past)], dim=1)
    ragged = rows.ragged or (memory is not None and memory.reference.ragged)
    implementation = names.attention_of(adapter.text_config)
    for part in mask.values() if isinstance(mask, dict) else (mask,):
        masks.check_width(part, past + prompt.length, prompt.length)
    if isinstance(mask, dict):
        # these go to the layers as they are, so None is plain causal over all rows
        whole = masks.causal(columns >= 0, new.shape[1], embeds.dtype, implementation) if ragged else None
        return {name: whole if part is None else masks.cut(part, new, columns) for name, part in mask.items()}
    if mask is None and (ragged or prompt.cache is None):
        # without a mask and without a cache, gaps in position_ids would be read as packed sequences
        mask = (columns >= 0).long()
    elif mask is not None:
        mask = masks.cut(mask, new, columns)
    return mask
