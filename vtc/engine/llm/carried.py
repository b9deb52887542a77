"""Signals of the encoder at the places of their tokens in the prompt, for stages at `llm_in` and in decoder layers.

They are laid out over the columns of the prompt. A merged token has the signal of its anchor; separators that the host
adds have zeros.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtc.adapter import Encoder
from vtc.engine.handover import Encoded
from vtc.engine.llm.forward import Forward
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan, Step
from vtc.engine.readers import Readers
from vtc.errors import SignalUnavailableError
from vtc.signals import SIGNALS

#: signals of the question of each prompt, [B, ...]; the others come with what was encoded
READERS: Readers[Callable[[Plan, Forward], Tensor]] = Readers()


def locate(state: Forward, encoder: Encoder, encoded: Encoded, located: Visual, images: Sequence[int]) -> None:
    """Lay what `encoded` carries out over the columns of the prompts.

    Raises:
        SignalUnavailableError: this modality cannot give what the plan carries.
    """
    for one in encoded.plan.carried:
        if one.name not in READERS and (one.name, one.layer) not in encoded.carried:
            reason = encoder.lacks(one.name, one.layer)
            raise SignalUnavailableError(
                f"a stage reads {one.name!r}, which {encoder.modality}s cannot give here: {reason}."
            )
    prompt = state.prompt
    assert prompt is not None
    where = torch.tensor(list(images), device=located.column.device)
    column = torch.where(located.column < 0, prompt.length, located.column)
    for key, value in encoded.carried.items():
        chosen = value.to(located.column.device)[where][:, : column.shape[1]]
        columns = state.carried.get(key)
        if columns is None:
            columns = chosen.new_zeros(prompt.batch, prompt.length + 1, *chosen.shape[2:])
        state.carried[key] = columns.index_put((located.sample_index[:, None], column), chosen)


def note_text(plan: Plan, state: Forward) -> None:
    """Read what the plan carries of the question of each prompt."""
    for one in plan.carried:
        if one.name in READERS:
            state.carried[one.name, one.layer] = READERS[one.name](plan, state)


def collect(step: Step, state: Forward, visual: Visual) -> dict[str, Tensor]:
    """The carried signals that `step` declares, aligned with the tokens of `visual`."""
    found: dict[str, Tensor] = {}
    for one in step.stage.signals:
        kind = SIGNALS[one.name]
        if kind.carried:
            value = state.carried[one.name, one.layer]
            found[one.name] = visual.gather(value) if kind.axis >= 0 else value[visual.sample_index]
    return found


@READERS.reads("clip_text_embeds")
def _clip_text_embeds(plan: Plan, state: Forward) -> Tensor:
    prompt = state.prompt
    assert plan.companion is not None
    assert prompt is not None and prompt.ids is not None and prompt.is_visual is not None
    place = torch.arange(prompt.length, device=prompt.device)
    is_text = prompt.text()
    behind = is_text & (place > torch.where(prompt.is_visual, place, -1).amax(dim=1, keepdim=True))
    chosen = torch.where(behind.any(dim=1, keepdim=True), behind, is_text).to(prompt.ids.device)
    ids = [row[keep].tolist() for row, keep in zip(prompt.ids, chosen, strict=True)]
    return plan.companion.text_embeds(ids, prompt.device)
