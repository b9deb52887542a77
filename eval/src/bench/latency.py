"""Where the time of a generation goes: encoder, projector, selection, prefill, first token, decoding.

One stock `generate` call gives all of it. Hooks mark when the tower, the projector and the language model start and
end, a stopping criterion marks each token. On CUDA the marks are events, read after the call, so that nothing waits in
between; elsewhere they are clock readings.

    encoder_ms             the vision tower, without a projector that lies inside it
    projector_ms           the projector alone; absent where a family has none
    selection_ms           deciding and applying, at all sites, with the capture at the door and in layers
    prefill_ms             the language model on the prompt, without the selection inside it
    ttft_ms                from pixels to the first token: everything above, and what lies between
    decode_ms_per_token    mean over the tokens that follow
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine import Handle
from vtc.eval.bench.costs import is_part, projector_of
from vtc.eval.results.timing import Timing, summary

PHASES = ("encoder_ms", "projector_ms", "selection_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token")

Generate = Callable[..., Tensor]
Patched = Callable[[], AbstractContextManager[Handle | None]]


@dataclass(frozen=True)
class Variant:
    """One way to answer a prompt.

    Args:
        generate: takes the options of `generate` and returns ids.
        patched: the context in which it runs; entering and leaving it is not timed.
    """

    generate: Generate
    patched: Patched


@dataclass
class Phases:
    """Milliseconds of each timed call, by phase."""

    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, call: Mapping[str, float]) -> None:
        """Note one call."""
        for name, value in call.items():
            self.samples.setdefault(name, []).append(value)

    def summaries(self) -> dict[str, Timing]:
        """Median and quantiles of each phase."""
        return {name: summary(self.samples[name]) for name in PHASES if name in self.samples}


def measure(
    adapter: Adapter,
    variants: Mapping[str, Variant],
    *,
    runs: int = 5,
    warmup: int = 1,
    new_tokens: int = 8,
) -> dict[str, Phases]:
    """Time `variants` in turns, so that a slow moment of the machine hits all of them alike.

    Args:
        runs: timed calls of each.
        warmup: calls before them.
        new_tokens: tokens decoded behind the first one.
    """
    found = {name: Phases() for name in variants}
    for turn in range(warmup + runs):
        for name, variant in variants.items():
            call = timed(adapter, variant, new_tokens)
            if turn >= warmup:
                found[name].add(call)
    return found


def timed(adapter: Adapter, variant: Variant, new_tokens: int) -> dict[str, float]:
    """Milliseconds of one call, by phase."""
    from transformers import StoppingCriteriaList

    clock = _clock(adapter.device)
    tokens: list[Any] = []
    with variant.patched() as handle, _marks(adapter, clock) as marks:
        clock.wait()
        start = clock.now()
        with torch.inference_mode():
            variant.generate(
                max_new_tokens=1 + new_tokens,
                min_new_tokens=1 + new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([_marker(clock, tokens)]),
            )
        clock.wait()
        selection = handle.report.selection_ms if handle is not None else {}
    spans = {name: sum(clock.ms(*span) for span in marks[name]) for name in ("tower", "projector") if marks[name]}
    inside = any(is_part(projector_of(adapter, encoder), encoder.tower) for encoder in adapter.encoders)
    in_layers = sum(ms for site, ms in selection.items() if site.startswith("layer"))
    found = {"encoder_ms": spans.get("tower", 0.0) - (spans.get("projector", 0.0) if inside else 0.0)}
    if "projector" in spans:
        found["projector_ms"] = spans["projector"]
    if handle is not None:
        found["selection_ms"] = sum(selection.values())
    found["prefill_ms"] = clock.ms(*marks["prefill"][0]) - in_layers
    found["ttft_ms"] = clock.ms(start, tokens[0])
    if len(tokens) > 1:
        found["decode_ms_per_token"] = clock.ms(tokens[0], tokens[-1]) / (len(tokens) - 1)
    return found


@contextmanager
def _marks(adapter: Adapter, clock: "_Host | _Cuda") -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Spans of the tower, the projector and the language model; inside the hooks that a patch put on before."""
    spans: dict[str, list[tuple[Any, Any]]] = {"tower": [], "projector": [], "prefill": []}
    watched: dict[nn.Module, str] = {adapter.language_model: "prefill"}
    for encoder in adapter.encoders:
        watched[encoder.tower] = "tower"
        projector = projector_of(adapter, encoder)
        if projector is not None:
            watched[projector] = "projector"
    handles: list[Any] = []
    for module, name in watched.items():
        handles += _span(module, spans[name], clock)
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _span(module: nn.Module, spans: list[tuple[Any, Any]], clock: "_Host | _Cuda") -> list[Any]:
    begun: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        begun.append(clock.now())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        spans.append((begun.pop(), clock.now()))

    # a pre-hook registered last and a hook put first are the innermost ones
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, prepend=True)]


def _marker(clock: "_Host | _Cuda", tokens: list[Any]) -> Any:
    from transformers import StoppingCriteria

    class Marker(StoppingCriteria):
        """Notes when a token is there and never stops."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            tokens.append(clock.now())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return Marker()


class _Host:
    def now(self) -> float:
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        """Calls on the host are done when they return."""


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def _clock(device: torch.device) -> _Host | _Cuda:
    return _Cuda(device) if device.type == "cuda" else _Host()
