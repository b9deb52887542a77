"""Measures the operations of `vtc.kernels`: `python -m vtc.eval.kernels`.

In one run, on the same inputs: Triton (on a CUDA or ROCm device), the chunked torch path, the eager path (the
reference, or for greedy selection the usual code with the whole matrix and one row per step), `torch.compile` of that
eager path, and the floor: max(bytes / measured copy bandwidth, FLOPs / measured matmul rate). Providers take turns, so
that drift hits all of them. Medians with 20/80 quantiles go to a JSON file with an environment block, and to a plot.
The floor counts what the definition needs: a path that uses symmetry computes less and can be faster than it.

A correctness gate runs first, with every provider on small inputs; when it is red, no time is measured and the exit
code is 1. Peak extra memory (beyond inputs and result) must stay within `MEMORY_FACTOR` times the input plus
`MEMORY_SLACK`.
"""

import argparse
import datetime
import gc
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtc.kernels as kernels
from vtc.eval.environment import environment
from vtc.eval.timing import Timing, compare
from vtc.kernels.attention_rows import cost as attention_rows_cost
from vtc.kernels.compact import cost as compact_cost
from vtc.kernels.cosine_match import cost as cosine_match_cost
from vtc.kernels.diversity import cost as diversity_cost
from vtc.kernels.dpp_map import cost as dpp_map_cost
from vtc.kernels.frame_similarity import cost as frame_similarity_cost
from vtc.kernels.received_attention import cost as received_attention_cost
from vtc.kernels.segment_merge import cost as segment_merge_cost
from vtc.kernels.similarity_degree import cost as similarity_degree_cost

TOKENS, WIDTHS, BATCHES = (576, 2880, 6272, 25088), (1024, 3584), (1, 8, 32)
QUICK_TOKENS, QUICK_WIDTHS, QUICK_BATCHES = (576, 2880), (1024,), (1,)
PICKS = 64
HEAD_WIDTH = 64
FRAMES = 16
MEMORY_FACTOR = 4
MEMORY_SLACK = 16 << 20
SECONDS_PER_CASE = 10.0

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """One point of the grid."""

    num_tokens: int
    width: int
    batch: int


@dataclass(frozen=True)
class Case:
    """One operation at one size: the same inputs for every provider, for time, memory and the gate."""

    run: Callable[[str], Any]
    eager: Call
    cost: kernels.Cost
    eager_bytes: int
    input_bytes: int


class Inputs:
    """Random inputs of one size, seeded, with the dtype under test."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        source = torch.Generator().manual_seed(0)
        self.size, self.itemsize = size, torch.empty(0, dtype=dtype).element_size()
        batch, count, width = size.batch, size.num_tokens, size.width
        self.x = torch.randn(batch, count, width, generator=source).to(device, dtype)
        self.reversed = self.x.flip(1)
        self.score = torch.rand(batch, count, generator=source).to(device)
        self.index = torch.arange(0, count, 4, device=device).expand(batch, -1)
        self.assignment = torch.randint(0, max(1, count // 4), (batch, count), generator=source).to(device)
        self.position_ids = torch.arange(count, device=device).expand(3, batch, count)
        self.heads = width // HEAD_WIDTH
        self.q = self.x.view(batch, count, self.heads, HEAD_WIDTH).transpose(1, 2)
        self.k = self.q.flip(2)
        self.frames = self.x.view(batch, FRAMES, count // FRAMES, width)
        self.input_bytes = self.x.numel() * self.itemsize


def similarity_count(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.similarity_degree(i.x, reduce="count", threshold=0.1, impl=impl)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=1, itemsize=i.itemsize))


def similarity_mean(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.similarity_degree(i.x, reduce="mean", impl=impl)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=0, itemsize=i.itemsize))


def similarity_propagate(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        options: dict[str, Any] = {"threshold": 0.1, "temperature": 0.1, "transpose": True}
        return kernels.similarity_propagate(i.x, i.score, impl=impl, **options)

    return _square(i, run, similarity_degree_cost(*_shape(i), passes=2, itemsize=i.itemsize))


def cosine_match(i: Inputs) -> Case:
    def run(impl: str) -> tuple[Tensor, Tensor]:
        return kernels.cosine_match(i.x, i.reversed, impl=impl)

    count = i.size.num_tokens
    return _square(i, run, cosine_match_cost(i.size.batch, count, count, i.size.width, i.itemsize))


def received_attention(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.received_attention(i.q, i.k, impl=impl)

    sizes = (i.size.batch, i.heads, i.heads, i.size.num_tokens, HEAD_WIDTH)
    return _square(i, run, received_attention_cost(*sizes, itemsize=i.itemsize), matrices=3 * i.heads)


def attention_rows(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.attention_rows(i.q[:, :, -4:], i.k, impl=impl)

    sizes = (i.size.batch, i.heads, i.heads, 4, i.size.num_tokens, HEAD_WIDTH)
    case_cost = attention_rows_cost(*sizes, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 3 * i.input_bytes, i.input_bytes)


def farthest_point(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.farthest_point(i.x, PICKS, impl=impl)

    def eager() -> Tensor:
        return eager_greedy(i.x, PICKS)

    case_cost = diversity_cost(*_shape(i), PICKS, is_seeded=False, is_sum=False, itemsize=i.itemsize)
    return _square(i, run, case_cost, eager=eager)


def max_sum(i: Inputs) -> Case:
    start = torch.zeros(i.size.batch, dtype=torch.int64, device=i.x.device)

    def run(impl: str) -> Tensor:
        return kernels.max_sum(i.x, PICKS, start=start, impl=impl)

    def eager() -> Tensor:
        return eager_greedy(i.x, PICKS, start)

    case_cost = diversity_cost(*_shape(i), PICKS, is_seeded=True, is_sum=True, itemsize=i.itemsize)
    return _square(i, run, case_cost, eager=eager)


def dpp_map(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.dpp_map_features(i.x, i.score, PICKS, impl=impl)

    def eager() -> Tensor:
        return eager_dpp(i.x, i.score, PICKS)

    return _square(i, run, dpp_map_cost(*_shape(i), PICKS, itemsize=i.itemsize), eager=eager)


def segment_merge(i: Inputs) -> Case:
    slots = max(1, i.size.num_tokens // 4)

    def run(impl: str) -> Tensor:
        return kernels.segment_merge(i.x, i.assignment, slots, weights=i.score, impl=impl)

    return _square(i, run, segment_merge_cost(*_shape(i), slots, itemsize=i.itemsize))


def frame_similarity(i: Inputs) -> Case:
    def run(impl: str) -> Tensor:
        return kernels.frame_similarity(i.frames, impl=impl)

    sizes = (i.size.batch, FRAMES, i.size.num_tokens // FRAMES, i.size.width)
    case_cost = frame_similarity_cost(*sizes, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 4 * i.input_bytes, i.input_bytes)


def compact(i: Inputs) -> Case:
    def run(impl: str) -> kernels.Compacted:
        return kernels.compact(i.index, i.x, position_ids=i.position_ids, impl=impl)

    case_cost = compact_cost(i.size.batch, i.index.shape[1], i.size.width, 24, itemsize=i.itemsize)
    return Case(run, lambda: run("reference"), case_cost, 2 * i.input_bytes, i.input_bytes)


SETUPS: dict[str, Callable[[Inputs], Case]] = {
    "attention_rows": attention_rows,
    "compact": compact,
    "cosine_match": cosine_match,
    "dpp_map": dpp_map,
    "farthest_point": farthest_point,
    "frame_similarity": frame_similarity,
    "max_sum": max_sum,
    "received_attention": received_attention,
    "segment_merge": segment_merge,
    "similarity_count": similarity_count,
    "similarity_mean": similarity_mean,
    "similarity_propagate": similarity_propagate,
}


def _shape(i: Inputs) -> tuple[int, int, int]:
    return i.size.batch, i.size.num_tokens, i.size.width


def _square(
    i: Inputs, run: Callable[[str], Any], cost: kernels.Cost, *, eager: Call | None = None, matrices: int = 3
) -> Case:
    """A case whose eager path holds `matrices` float32 matrices of N x N beside two float32 copies of the input."""
    batch, count, width = _shape(i)
    eager_bytes = 4 * batch * (matrices * count * count + 2 * count * width)
    return Case(run, eager or (lambda: run("reference")), cost, eager_bytes, i.input_bytes)


def eager_greedy(x: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    """The usual eager selection: whole distance matrix, one row per step. Max-min, or max-sum with a `start`."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    picks = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    pick = distance.topk(2, dim=-1, largest=False).values[..., 1].argmax(dim=-1) if start is None else start
    reach: Tensor | None = None
    for step in range(k):
        picks[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        row = torch.take_along_dim(distance, pick[:, None, None], dim=1)[:, 0]
        if reach is None:
            reach = row
        else:
            reach = torch.minimum(reach, row) if start is None else reach + row
        pick = reach.masked_fill(taken, -math.inf).argmax(dim=-1)
    return picks


def eager_dpp(x: Tensor, quality: Tensor, k: int) -> Tensor:
    """The usual eager greedy MAP: whole kernel, Cholesky rows."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    kernel = quality[:, :, None] * (unit @ unit.mT) * quality[:, None]
    variance = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = torch.zeros(x.shape[0], k, x.shape[1], device=x.device)
    picks = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    for step in range(k):
        best, pick = variance.max(dim=-1, keepdim=True)
        picks[:, step] = pick[:, 0]
        row = torch.take_along_dim(kernel, pick[..., None], dim=1)[:, 0]
        earlier = rows[:, :step]
        row = (row - (torch.take_along_dim(earlier, pick[..., None], dim=2) * earlier).sum(dim=1)) / best.sqrt()
        rows[:, step] = row
        variance = (variance - row.square()).scatter(1, pick, -math.inf)
    return picks


def providers_of(case: Case, device: str, names: list[str]) -> dict[str, Call]:
    """The callables to measure; `compile` wraps the eager path."""
    available: dict[str, Call] = {"eager": case.eager, "torch": lambda: case.run("torch")}
    if device != "cpu":
        available["triton"] = lambda: case.run("triton")
    if "compile" in names:
        available["compile"] = torch.compile(case.eager)
    return {name: available[name] for name in names if name in available}


def gate(operations: list[str], names: list[str], device: str, dtype: torch.dtype) -> list[str]:
    """What every provider gets wrong against the reference on small inputs; empty when all is well."""
    faults = []
    for operation in operations:
        case = SETUPS[operation](Inputs(Size(160, 128, 2), dtype, device))
        expected = _tensors(case.run("reference"))
        for name, call in providers_of(case, device, names).items():
            for place, (want, got) in enumerate(zip(expected, _tensors(call()), strict=True)):
                is_equal = torch.equal(want, got) if not want.is_floating_point() else None
                if is_equal is None:
                    is_equal = torch.allclose(got.float(), want.float(), atol=1e-3, rtol=1e-3)
                if not is_equal:
                    faults.append(f"{operation}: output {place} of {name} differs from the reference")
    return faults


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if part is not None]


def time_all(calls: dict[str, Call], device: str, repeats: int) -> dict[str, Timing]:
    """Milliseconds of each provider, in turns; fewer turns (at least 3) when they take long."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    affordable = int(SECONDS_PER_CASE / max(1e-9, time.perf_counter() - start))
    return compare(calls, torch.device(device), runs=max(3, min(repeats, affordable)), warmup=1)


def extra_memory(call: Call, device: str) -> int:
    """Peak bytes allocated during a call, less the bytes of its result."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = call()
        recorded = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
        current = peak = 0
        for _, change in changes:
            current += change
            peak = max(peak, current)
    return max(0, peak - sum(part.numel() * part.element_size() for part in _tensors(result)))


def measure_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth (bytes read and written per second) and matmul rate (FLOPs per second), at the 20 % quantile."""
    elements = (256 << 20) if device != "cpu" else (16 << 20)
    side = 8192 if device != "cpu" else 1536
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left = torch.ones(side, side, dtype=dtype, device=device)
    copy = time_all({"copy": lambda: target.copy_(source)}, device, 15)["copy"].p20
    product = time_all({"matmul": lambda: left @ left}, device, 15)["matmul"].p20
    return {"copy_bytes_per_s": 8e3 * elements / copy, "matmul_flops_per_s": 2e3 * side**3 / product}


def measure(
    operation: str, size: Size, options: argparse.Namespace, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One row per provider."""
    case = SETUPS[operation](Inputs(size, options.dtype, options.device))
    names = list(options.providers)
    base = {"operation": operation, "num_tokens": size.num_tokens, "width": size.width, "batch": size.batch}
    base["dtype"] = str(options.dtype).removeprefix("torch.")
    floor = 1e3 * max(case.cost.bytes / rates["copy_bytes_per_s"], case.cost.flops / rates["matmul_flops_per_s"])
    base.update(flops=case.cost.flops, bytes=case.cost.bytes, floor_ms=floor)
    if case.eager_bytes > options.memory_limit:
        reason = f"skipped: the eager path needs about {case.eager_bytes / 2**30:.1f} GiB"
        yield {**base, "provider": "eager", "note": reason}
        names = [name for name in names if name not in ("eager", "compile")]
    calls = providers_of(case, options.device, names)
    memory = {name: extra_memory(call, options.device) for name, call in calls.items()}
    times = time_all(calls, options.device, options.repeats)
    for name, timing in times.items():
        row = {**base, "provider": name, "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
        row.update(runs=timing.runs, extra_bytes=memory[name], share_of_floor=floor / timing.median)
        if "eager" in times:
            row["speed_up_over_eager"] = times["eager"].median / timing.median
            row["memory_share_of_eager"] = memory[name] / max(1, memory["eager"])
        if name in ("torch", "triton"):
            row["is_memory_linear"] = memory[name] <= MEMORY_FACTOR * case.input_bytes + MEMORY_SLACK
        yield row


def describe(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers; the load average tells whether the machine was shared."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        **environment(device),
    }


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed-up over eager and share of its memory, one bar per operation, one panel per number of tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if "speed_up_over_eager" in row and row["provider"] != "eager"]
    counts = sorted({row["num_tokens"] for row in shown})
    figure, panels = plt.subplots(
        1, max(1, len(counts)), figsize=(5 * max(1, len(counts)), 5), squeeze=False, sharey=True
    )
    for panel, count in zip(panels[0], counts, strict=False):
        here = [row for row in shown if row["num_tokens"] == count]
        labels = [f"{row['operation']} ({row['provider']}, D{row['width']}, B{row['batch']})" for row in here]
        panel.barh(labels, [row["speed_up_over_eager"] for row in here], color="#3b6ea5")
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=f"N = {count}", xlabel="times faster than eager")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vtc.eval.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default=None, help="float32, float16 or bfloat16; default bfloat16, on the CPU float32"
    )
    parser.add_argument("--operations", nargs="+", choices=sorted(SETUPS), default=sorted(SETUPS))
    parser.add_argument("--providers", nargs="+", choices=["eager", "torch", "triton", "compile"], default=None)
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_true", help="small grid, the default on the CPU")
    grid.add_argument("--full", action="store_true", help="the whole grid, the default on a GPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="replaces the grid's numbers of tokens")
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads; use 1 when other programs share the cores"
    )
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--memory-limit", type=float, default=None, help="GiB the eager path may take")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    parser.add_argument("--plot", type=pathlib.Path, default=None)
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    options.is_quick = options.quick or (is_cpu and not options.full)
    options.dtype = getattr(torch, options.dtype or ("float32" if is_cpu else "bfloat16"))
    options.providers = options.providers or (["eager", "torch"] if is_cpu else ["eager", "compile", "torch", "triton"])
    free = 8 * 2**30 if is_cpu else 0.8 * torch.cuda.mem_get_info()[0]
    options.memory_limit = free if options.memory_limit is None else options.memory_limit * 2**30
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    faults = gate(options.operations, options.providers, options.device, options.dtype)
    if faults:
        print("The correctness gate is red; nothing is measured.", *faults, sep="\n")
        return 1
    tokens, widths, batches = (
        (QUICK_TOKENS, QUICK_WIDTHS, QUICK_BATCHES) if options.is_quick else (TOKENS, WIDTHS, BATCHES)
    )
    sizes = [Size(n, d, b) for b in batches for d in widths for n in (options.tokens or tokens)]
    rates = measure_rates(options.device, options.dtype)
    result: dict[str, Any] = {"environment": describe(options.device), "rates": rates, "gate": "green", "rows": []}
    for size in sizes:
        for operation in options.operations:
            for row in measure(operation, size, options, rates):
                result["rows"].append(row)
                _print(row)
    if options.out:
        options.out.write_text(to_text(result))
    if options.plot:
        draw(result["rows"], options.plot)
    heavy = [row for row in result["rows"] if row.get("is_memory_linear") is False]
    for row in heavy:
        print(f"{row['operation']} ({row['provider']}, N={row['num_tokens']}) takes more than O(N D) memory")
    return 1 if heavy else 0


def to_text(result: dict[str, Any]) -> str:
    """JSON with one row per line and four significant digits, so that a change of a row is a change of a line."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    rows = [json.dumps({key: short(value) for key, value in row.items()}) for row in result["rows"]]
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1).removesuffix("\n}")
    return head + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def _print(row: dict[str, Any]) -> None:
    size = f"N={row['num_tokens']:<6d} D={row['width']:<5d} B={row['batch']:<3d}"
    place = f"{row['operation']:22s} {size} {row['provider']:8s}"
    if "note" in row:
        print(place, row["note"], flush=True)
        return
    speed = f"{row['speed_up_over_eager']:7.2f}x eager" if "speed_up_over_eager" in row else ""
    times = f"{row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
    print(
        place,
        times,
        f"{row['extra_bytes'] / 2**20:9.2f} MiB  {100 * row['share_of_floor']:5.1f} % of floor",
        speed,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
