"""What a decision costs by itself: every method on drawn tokens, beside one dense prefill of the same machine.

The features have the width of CLIP-L and the signals are given: capturing them belongs to the forward, and `vtc bench`
measures it there. The prefill is that of LLaVA-1.5-7B with as many visual tokens and 64 words: one decoder layer is
timed, and multiplied by 32, because a laptop has no place for all of them.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtc.errors import VTCError
from vtc.eval.bench.architectures import TEXT_TOKENS, VICUNA_7B
from vtc.eval.results.file import REFERENCE, Result, reason_of, state_of, write
from vtc.eval.results.timing import Timing, compare
from vtc.spec import parse
from vtc.stages import Method
from vtc.testing.conformance import draw_tokens
from vtc.tokens import Budget, Layout, Tokens

SIDE = 24
#: visual tokens -> tiles of 24 x 24: LLaVA-1.5, and LLaVA-NeXT with four tiles
SIZES: Mapping[int, int] = {576: 1, 2880: 5}
KEPT = 1 / 9  # 64 of 576, as most papers report
AXES = {"D": 1024, "H": 16, "G": 16, "L": 24, "T": 32, "M": 2, "E": 768, "d": 64}
#: seconds after which a method is not timed again, and calls that are timed at most
PATIENCE, RUNS = 2.0, 5


def add(
    result: Result,
    specs: Sequence[str],
    device: torch.device,
    path: Path,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill `result["selection"]`, and write the file after each method; rows that are there already stay."""
    table = result.setdefault("selection", {})
    if REFERENCE not in table:
        table[REFERENCE] = {str(n): dense_prefill(n, device).to_dict(None) for n in SIZES}
        write(result, path)
    for spec in specs:
        if spec not in table:
            table[spec] = row(spec, table[REFERENCE], device)
            write(result, path)
            say(f"selection of {spec}: {in_words(table[spec])}")


def row(spec: str, reference: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of a method's decision at each size, and their share of the dense prefill."""
    found: dict[str, Any] = {}
    for n in SIZES:
        try:
            timing = decision(spec, n, device)
        except VTCError as error:
            return {"refused": str(error)}
        except Exception as error:  # as in `vtc.eval.bench.cells`: a broken method costs its own row only
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}"}
        found[str(n)] = {**timing.to_dict(None), "share": timing.median / reference[str(n)]["median"]}
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """A row as a short text."""
    if state_of(found) != "done":
        return f"{state_of(found)}: {reason_of(found)}"
    return ", ".join(f"N={n} {cell['median']:.2f} ms ({cell['share']:.2%} of a prefill)" for n, cell in found.items())


def decision(spec: str, num_tokens: int, device: torch.device) -> Timing:
    """Time of all stages of a spec on one group of `num_tokens` tokens, each on what the one before left."""
    stages: list[tuple[Any, Tokens]] = []
    length = num_tokens
    for method in parse(spec, max(1, round(num_tokens * KEPT))):
        for stage in method.stages():
            tokens = drawn(method, stage, length, device)
            stages.append((stage, tokens))
            if stage.parks_until is None and not stage.freezes:
                length = max(1, *stage.decide(tokens).lengths)

    def decide() -> None:
        for stage, tokens in stages:
            stage.decide(tokens).apply(tokens.x)

    start = time.perf_counter()
    decide()
    _wait(device)
    affordable = int(PATIENCE / max(1e-6, time.perf_counter() - start))
    return compare({"": decide}, device, runs=max(1, min(RUNS, affordable)), warmup=1)[""]


def drawn(method: Method, stage: Any, length: int, device: torch.device) -> Tokens:
    """Random tokens of the real width, on the grid where there are as many as the grid has places."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    budget: Budget = method.budget_for(stage)
    tokens = draw_tokens(stage, (length,), budget, dtype=dtype, axes=AXES)
    layout = tokens.layout
    assert layout is not None
    if length in SIZES:
        extra = layout.row.shape[1] - length  # inside the tower the layout covers the prefix
        grid = Layout.grid(SIDE, SIDE, segments=SIZES[length])
        layout = grid.map(lambda part: nn.functional.pad(part, (extra, 0), value=-1))
    signals = {name: value.to(device) for name, value in tokens.signals.items()}
    return dataclasses.replace(tokens, x=tokens.x.to(device), layout=layout.to(device), signals=signals)


def dense_prefill(num_tokens: int, device: torch.device) -> Timing:
    """Time of the decoder of LLaVA-1.5-7B on `num_tokens` visual tokens and a question."""
    from transformers import LlamaConfig, LlamaModel

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = LlamaConfig(**dataclasses.replace(VICUNA_7B, layers=1, vocabulary=128).options())
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model: Any = LlamaModel(config)
        model.to(dtype).eval()
        embeds = torch.randn(1, num_tokens + TEXT_TOKENS, config.hidden_size, dtype=dtype)

    def prefill() -> None:
        with torch.inference_mode():
            model(inputs_embeds=embeds, use_cache=True)

    layer = compare({"": prefill}, device, runs=3, warmup=1)[""]
    median, p20, p80 = (VICUNA_7B.layers * value for value in (layer.median, layer.p20, layer.p80))
    return Timing(median, p20, p80, layer.runs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
