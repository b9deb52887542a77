"""What travels through one call: context variables, so that threads and interleaved generations do not mix."""

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Encoder
from vtc.engine.plan import Plan, Step
from vtc.errors import InputError, VTCError
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout, Tokens

#: attribute of an encoder's output and of a KV cache under which vtc keeps what belongs to them
ATTRIBUTE = "_vtc"


@dataclass(frozen=True, eq=False)
class Encoded:
    """What was decided while images were encoded; rides on the encoder's own output object.

    `generate` encodes in one call and prefills in another, and users may encode once and prefill often.
    """

    plan: Plan
    lengths: tuple[int, ...]
    layout: Layout
    token_map: TokenMap | None
    seconds: float
    tower_seconds: tuple[tuple[str, Any], ...] = ()  # (site, watch) of each decision inside the tower
    carried: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (signal, layer) -> [images, slots, ...]


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


#: the spec of each encoder that is patched by itself (`vtc.engine.vision.alone`), by its tower
PATCHED_ENCODERS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()

ENCODE: ContextVar[EncodeState | None] = ContextVar("vtc_encode", default=None)


def run_step(step: Step, tokens: Tokens) -> TokenMap:
    """Run a stage on `tokens`; a budget that covers every group keeps all, and the stage is not asked.

    Raises:
        InputError: NaN or infinite features or signals.
        VTCError: whatever the stage raises on purpose, with the step named.
    """
    if not all(tokens.lengths):  # an earlier stage dropped whole groups; the others are decided alone
        return _without_empty(step, tokens)
    covers_all = all(k >= n for k, n in zip(tokens.budget, tokens.lengths, strict=True))
    covers_all = covers_all and step.stage.leave != "freeze"  # freezing has no budget: nothing leaves
    if covers_all and "adaptive" not in step.method.tags:  # to an adaptive method, all is a ceiling
        identity = TokenMap.identity(tokens.lengths, tokens.x.device)
        if not tokens.num_prefix:
            return identity
        anchor = torch.where(identity.anchor < 0, -1, identity.anchor + tokens.num_prefix)
        return TokenMap(anchor, identity.lengths, identity.num_tokens + tokens.num_prefix)
    check_finite(step, tokens)
    try:
        return step.stage.decide(tokens)
    except VTCError:
        raise
    except Exception as error:
        error.add_note(f"in {step}: tokens {tuple(tokens.x.shape)}, lengths {tokens.lengths}, budget {tokens.budget}")
        raise


def _without_empty(step: Step, tokens: Tokens) -> TokenMap:
    """The map of groups of which some are empty."""
    alive = [g for g, n in enumerate(tokens.lengths) if n]
    lengths = [0] * len(tokens.lengths)
    if not alive:
        return TokenMap.identity(lengths, tokens.x.device)
    part = run_step(step, tokens.groups(alive))
    for g, n in zip(alive, part.lengths, strict=True):
        lengths[g] = n
    rows = torch.tensor(alive, device=tokens.x.device)

    def spread(values: Tensor | None, fill: int) -> Tensor | None:
        if values is None:
            return None
        return values.new_full((len(lengths), values.shape[1]), fill).index_copy(0, rows, values)

    anchor = spread(part.anchor, -1)
    assert anchor is not None
    return TokenMap(
        anchor,
        tuple(lengths),
        tokens.x.shape[1],
        spread(part.source, 0),
        spread(part.slot, -1),
        spread(part.weight, 0),
        spread(part.mass, 0),
    )


def check_finite(step: Step, tokens: Tokens) -> None:
    """One look at everything the stage reads.

    Raises:
        InputError: something is NaN or infinite.
    """
    named = {"features": tokens.x, **{k: v for k, v in tokens.signals.items() if v.is_floating_point()}}
    bad = torch.stack([(~torch.isfinite(value)).any().to(tokens.x.device) for value in named.values()])
    if bad.any():
        names = [name for name, is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
        raise InputError(
            f"{step}: {' and '.join(names)} contain NaN or infinite values, so no token can be ranked. "
            "Check the image and the model's dtype (fp16 overflow: load it in bfloat16 or float32)."
        )


@contextmanager
def stopwatch(device: torch.device) -> Iterator[Any]:
    """Measure the block; the result has `.seconds` (on CUDA read lazily from events, without waiting here)."""
    watch = _CudaWatch() if device.type == "cuda" else _HostWatch()
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


class _HostWatch:
    seconds = math.nan

    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._begin


class _CudaWatch:
    def start(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    @property
    def seconds(self) -> float:
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3
