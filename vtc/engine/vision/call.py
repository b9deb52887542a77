"""One call of an encoder, in a context variable, so that threads and interleaved generations do not mix."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.adapter import Encoder
from vtc.tokenmap import TokenMap


@dataclass
class EncodeState:
    """One call of an encoder."""

    encoder: Encoder
    arguments: dict[str, Any] = field(default_factory=dict)
    captured: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)  # arguments of the tower blocks that give signals
    features: Tensor | None = None  # what entered the projector, uncompressed
    grid: tuple[int, int] | None = None  # the grid that the tower runs on instead of its own, in tokens
    decided: TokenMap | None = None  # what the `pixels` stage decided
    passage: Any = None  # the `tower.Passage` of this call, where stages act inside the tower
    token_map: TokenMap | None = None  # of the images' slots in the LLM
    place: Tensor | None = None  # [G, K] place of each feature that stays in the group that the projector got
    rows: list[int] = field(default_factory=list)  # those groups
    shape: torch.Size | None = None  # of what entered the projector
    seconds: float = 0.0


ENCODE: ContextVar[EncodeState | None] = ContextVar("vtc_encode", default=None)


def state_of(encoder: Encoder) -> EncodeState | None:
    """The running call of `encoder`, None while another one or none runs."""
    state = ENCODE.get()
    return state if state is not None and state.encoder.method == encoder.method else None
