"""Signals of the encoder at the places of their tokens in the prompt, for stages at `llm_in` and in decoder layers.

They ride on the encoder's output, next to what was decided, and are laid out over the columns of the prompt. A merged
token has the signal of its anchor; separators that the host adds have zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.adapter import Adapter, Encoder, Packing
from vtc.engine.decide import Encoded, EncodeState
from vtc.engine.llm.forward import Forward
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import CARRIED, Plan, Step
from vtc.engine.vision.signals import signal
from vtc.errors import SignalUnavailableError
from vtc.stages import Signal

TEXT = "clip_text_embeds"


def wanted(plan: Plan) -> tuple[Signal, ...]:
    """The encoder signals that stages behind the encoder read."""
    steps = [step for step in plan.steps if step.stage.site.name in ("llm_in", "layer")]
    found = {s for step in steps for s in step.stage.signals if s.name in CARRIED}
    return tuple(sorted(found, key=lambda s: (s.name, s.layer)))


def of_images(adapter: Adapter, plan: Plan, state: EncodeState) -> dict[tuple[str, int], Tensor]:
    """What is carried of one encoder call: [images, slots] or [images, slots, E] by signal and layer."""
    found: dict[tuple[str, int], Tensor] = {}
    for one in wanted(plan):
        if one.name == TEXT or state.encoder.lacks(one.name, one.layer) is not None:
            continue
        value = _image_embeds(plan, state) if one.name == "clip_image_embeds" else signal(state, one)
        assert value is not None
        if state.decided is not None:  # of a smaller grid
            value = _at(state.decided.anchor, value, state.decided.num_tokens)
        found[one.name, one.layer] = _slots(value, adapter.packing(state.encoder, state.arguments))
    return found


def locate(state: Forward, encoder: Encoder, encoded: Encoded, located: Visual, images: Sequence[int]) -> None:
    """Lay what `encoded` carries out over the columns of the prompts.

    Raises:
        SignalUnavailableError: this modality cannot give what the plan carries.
    """
    for one in wanted(encoded.plan):
        if one.name != TEXT and (one.name, one.layer) not in encoded.carried:
            reason = encoder.lacks(one.name, one.layer)
            raise SignalUnavailableError(
                f"a stage reads {one.name!r}, which {encoder.modality}s cannot give here: {reason}."
            )
    where = torch.tensor(list(images), device=located.column.device)
    column = torch.where(located.column < 0, state.length, located.column)
    for key, value in encoded.carried.items():
        chosen = value.to(located.column.device)[where][:, : column.shape[1]]
        columns = state.carried.get(key)
        if columns is None:
            columns = chosen.new_zeros(state.batch, state.length + 1, *chosen.shape[2:])
        state.carried[key] = columns.index_put((located.sample_index[:, None], column), chosen)


def note_text(plan: Plan, state: Forward) -> None:
    """Embed the question of each prompt, where a stage reads that."""
    if plan.companion is None or all(one.name != TEXT for one in wanted(plan)):
        return
    assert state.input_ids is not None and state.is_visual is not None
    place = torch.arange(state.length, device=state.is_visual.device)
    is_text = ~state.is_visual if state.valid is None else ~state.is_visual & state.valid
    behind = is_text & (place > torch.where(state.is_visual, place, -1).amax(dim=1, keepdim=True))
    chosen = torch.where(behind.any(dim=1, keepdim=True), behind, is_text).to(state.input_ids.device)
    ids = [row[keep].tolist() for row, keep in zip(state.input_ids, chosen, strict=True)]
    state.carried[TEXT, 0] = plan.companion.text_embeds(ids, state.is_visual.device)


def collect(step: Step, state: Forward, visual: Visual) -> dict[str, Tensor]:
    """The carried signals that `step` declares, aligned with the tokens of `visual`."""
    found: dict[str, Tensor] = {}
    sample = visual.sample_index
    for one in step.stage.signals:
        if one.name in CARRIED:
            value = state.carried[one.name, one.layer]
            found[one.name] = value[sample] if one.name == TEXT else value[sample[:, None], visual.column.clamp(min=0)]
    return found


def reads_features(plan: Plan) -> bool:
    """Whether what enters the projector is needed as it is."""
    return any(one.name == "clip_image_embeds" for one in wanted(plan))


def _image_embeds(plan: Plan, state: EncodeState) -> Tensor:
    assert plan.companion is not None and state.features is not None
    return plan.companion.image_embeds(state.features)


def _slots(value: Tensor, packing: Packing | None) -> Tensor:
    """[groups, tokens, ...] of the host's groups as [images, slots, ...]."""
    if packing is None:
        return value
    width = max(packing.lengths)
    slot = packing.slot.to(value.device)
    image = torch.tensor(packing.image, device=value.device)[:, None]
    return _at(slot, value, width, image, len(packing.lengths))


def _at(place: Tensor, value: Tensor, width: int, row: Tensor | None = None, rows: int | None = None) -> Tensor:
    """[rows, width, ...] with `value` at its places, zeros elsewhere; place -1 is nowhere."""
    if row is None:
        row = torch.arange(len(value), device=value.device)[:, None]
    out = value.new_zeros(rows or len(value), width + 1, *value.shape[2:])
    return out.index_put((row, torch.where(place < 0, width, place)), value)[:, :width]
