"""What the encoder tells the door: what was decided about its features, and the signals that are carried with them.

It rides on the encoder's own output object: `generate` encodes in one call and prefills in another, and users may
encode once and prefill often. Where pixels are given, both happen inside one call, and the door is told directly.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtc.engine.plan import Plan
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout

#: attribute of an encoder's output and of a KV cache under which vtc keeps what belongs to them
ATTRIBUTE = "_vtc"


@dataclass(frozen=True, eq=False)
class Encoded:
    """What was decided while images were encoded."""

    plan: Plan
    lengths: tuple[int, ...]
    layout: Layout
    token_map: TokenMap | None
    seconds: float
    tower_seconds: tuple[tuple[str, Any], ...] = ()  # (site, watch) of each decision inside the tower
    carried: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (signal, layer) -> [images, slots, ...]


#: where the running call of the inner model collects what is encoded inside it, by modality; None: no call runs
COLLECTED: ContextVar[dict[str, Encoded] | None] = ContextVar("vtc_collected", default=None)


def hand_over(modality: str, output: Any, encoded: Encoded) -> None:
    """Note `encoded` on the encoder's `output`, and tell the running call of the inner model."""
    setattr(output, ATTRIBUTE, encoded)
    collected = COLLECTED.get()
    if collected is not None:
        collected[modality] = encoded
