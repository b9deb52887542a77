"""One stage on tokens: its budget in numbers, its decision, the time that it took. No model is in sight here."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtc.engine.plan import Step
from vtc.errors import InputError, VTCError
from vtc.indices import shift
from vtc.stages import Schedule
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout, Tokens


def run_step(step: Step, tokens: Tokens) -> TokenMap:
    """Run a stage on `tokens`; a budget that covers every group keeps all, and the stage is not asked.

    Raises:
        InputError: NaN or infinite features or signals.
        VTCError: whatever the stage raises on purpose, with the step named.
    """
    if not all(tokens.lengths):  # an earlier stage dropped whole groups; the others are decided alone
        return _without_empty(step, tokens)
    covers_all = all(k >= n for k, n in zip(tokens.budget, tokens.lengths, strict=True))
    covers_all = covers_all and not step.stage.freezes  # freezing has no budget: nothing leaves
    if covers_all and "adaptive" not in step.method.tags:  # to an adaptive method, all is a ceiling
        identity = TokenMap.identity(tokens.lengths, tokens.x.device)
        if not tokens.num_prefix:
            return identity
        anchor = shift(identity.anchor, tokens.num_prefix)
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


def budgets(
    budget: Budget,
    origin: Sequence[tuple[int, ...]],
    lengths: Sequence[int],
    layout: Layout | None,
    sample: Sequence[int] | None = None,
    schedule: Schedule | None = None,
) -> tuple[int, ...]:
    """Tokens that stay in each group: counted on its uncompressed images, never more than it still has.

    A number per image or video counts for each image in the group; per tile or frame, for each of its segments; per
    sample, it is shared evenly by the groups of the sample.
    """
    if budget.per == "sample":
        assert sample is not None
        members = {row: [g for g, s in enumerate(sample) if s == row] for row in set(sample)}
        wanted = [0] * len(origin)
        for groups in members.values():
            (total,) = budget.resolve((sum(sum(origin[g]) for g in groups),))
            for rank, g in enumerate(groups):
                wanted[g] = total // len(groups) + (rank < total % len(groups))
    elif budget.per in ("tile", "frame") and budget.tokens is not None:
        segments = [len(grids) for grids in layout.grids] if layout is not None else [1] * len(origin)
        wanted = [budget.tokens * n for n in segments]
    else:
        wanted = [sum(budget.resolve(images)) for images in origin]
    wanted = [max(1, want) for want in wanted]
    if schedule is not None:  # which may end at nothing
        wanted = [max(0, schedule(sum(images), want)) for images, want in zip(origin, wanted, strict=True)]
    return tuple(min(want, have) for want, have in zip(wanted, lengths, strict=True))


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
