"""Measures the operations of `vtc.kernels`: `python -m vtc.eval.kernel_bench`.

In one run, on the same inputs: Triton (on a CUDA or ROCm device), the chunked torch path, the eager path (the
reference, or for greedy selection the usual code with the whole matrix and one row per step), `torch.compile` of that
eager path, and the floor: max(bytes / measured copy bandwidth, FLOPs / measured matmul rate). Providers take turns, so
that drift hits all of them. Medians with 20/80 quantiles go to a JSON file with an environment block, and to a plot.
The floor counts what the definition needs: a path that uses symmetry computes less and can be faster than it.

A correctness gate runs first, with every provider on small inputs; an operation that fails it is not timed, and the
exit code is 1. Peak extra memory (beyond inputs and result) must stay within `MEMORY_FACTOR` times the input plus
`MEMORY_SLACK`.

A run needs no attention. The file is rewritten after every case, small sizes come first, and what is left at
`--time-limit` is listed in the file. A path that does not fit, fails, or is predicted to take longer than
`SLOWEST_CALL` seconds leaves a row with the reason; when a failure takes the device with it, the run starts anew behind
it (`--resume`, which also continues a run that was cut off).
"""

import argparse
import functools
import gc
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.errors import EvaluationError
from vtc.eval.kernel_bench.cases import SETUPS, Call, Case, Inputs, Size
from vtc.eval.results.environment import environment
from vtc.eval.results.timing import Timing, compare, summary

TOKENS, WIDTHS, BATCHES = (576, 2880, 6272, 25088), (1024, 3584), (1, 8, 32)
QUICK_TOKENS, QUICK_WIDTHS, QUICK_BATCHES = (576, 2880), (1024,), (1,)
MEMORY_FACTOR = 4
MEMORY_SLACK = 16 << 20
SECONDS_PER_CASE = {"cpu": 10.0, "cuda": 1.0}
SLOWEST_CALL = {"cpu": 60.0, "cuda": 2.0}  # seconds; a prediction above it skips a path
DEVICE_TIME_LIMIT = 480.0
UNROLLED = ("dpp_map", "farthest_point", "max_sum")  # eager loops that torch.compile unrolls: slow to compile, so last
UNROLLED_SECONDS = 120.0  # left for one of these, or it does not start


@dataclass(frozen=True)
class Task:
    """One operation at one size with some of the providers."""

    operation: str
    size: Size
    providers: tuple[str, ...]

    @property
    def is_unrolled(self) -> bool:
        return self.operation in UNROLLED and "compile" in self.providers

    @property
    def label(self) -> str:
        size, suffix = self.size, " compile" if "compile" in self.providers else ""
        return f"{self.operation} N={size.num_tokens} D={size.width} B={size.batch}{suffix}"


@dataclass
class Run:
    """What a run knows: its options, the rates of the machine, the rows so far and the speed of each path."""

    options: argparse.Namespace
    result: dict[str, Any]
    speeds: dict[tuple[str, str], float] = field(default_factory=dict)  # last median, in units of the floor

    def add(self, row: dict[str, Any]) -> None:
        self.result["rows"].append(row)
        self.note_speed(row)
        _print(row)

    def note_speed(self, row: dict[str, Any]) -> None:
        if "median_ms" in row:
            self.speeds[row["operation"], row["provider"]] = row["median_ms"] / row["floor_ms"]

    def save(self) -> None:
        """Replaces the file in one step, so that a kill at any time leaves a whole one."""
        part = self.options.out.with_name(self.options.out.name + ".part")
        part.write_text(to_text(self.result))
        part.replace(self.options.out)


def providers_of(case: Case, device: str, names: tuple[str, ...] | list[str]) -> dict[str, Call]:
    """The callables to measure; `compile` wraps the eager path."""
    available: dict[str, Call] = {"eager": case.eager, "torch": lambda: case.run("torch")}
    if device != "cpu":
        available["triton"] = lambda: case.run("triton")
    if "compile" in names:
        torch._dynamo.reset()  # every case compiles for its own shape, and none falls back to eager
        available["compile"] = torch.compile(case.eager, dynamic=False)
    return {name: available[name] for name in names if name in available}


def gate(
    operations: list[str],
    names: list[str],
    device: str,
    dtype: torch.dtype,
    on_error: Callable[[str], None] = lambda operation: None,
) -> list[str]:
    """What a path gets wrong against the reference on small inputs ("operation: fault"); empty when all is well.

    `compile` is no path of this package and not checked. `on_error` hears of an operation that raised.
    """
    faults = []
    for operation in operations:
        try:
            case = SETUPS[operation](Inputs(Size(160, 128, 2), dtype, device))
            expected = _tensors(case.run("reference"))
            for name, call in providers_of(case, device, [name for name in names if name != "compile"]).items():
                for place, (want, got) in enumerate(zip(expected, _tensors(call()), strict=True)):
                    if not _is_same(want, got):
                        faults.append(f"{operation}: output {place} of {name} differs from the reference")
        except Exception as error:  # a kernel that does not compile must not cost the others their measurement
            faults.append(f"{operation}: {_in_one_line(error)}")
            print("Gate:", faults[-1], flush=True)
            on_error(operation)
    return faults


def _is_same(want: Tensor, got: Tensor) -> bool:
    if not want.is_floating_point():
        return torch.equal(want, got)
    return torch.allclose(got.float(), want.float(), atol=1e-3, rtol=1e-3)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if part is not None]


def _in_one_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def time_all(calls: dict[str, Call], device: str, repeats: int, *, clock: str = "wall") -> dict[str, Timing]:
    """Milliseconds of each provider, in turns; fewer turns (at least 3) when they take long.

    `clock="cpu"` counts the processor time of this process instead of what passes on the wall: on a machine shared
    with others it says what a call costs, not how long it waited.
    """
    start = time.perf_counter()
    for call in calls.values():
        call()
    _wait(device)
    affordable = int(SECONDS_PER_CASE[_kind(device)] / max(1e-9, time.perf_counter() - start))
    runs = max(3, min(repeats, affordable))
    if clock == "wall":
        return compare(calls, torch.device(device), runs=runs, warmup=0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            begin_ns = time.process_time_ns()
            call()
            samples[name].append((time.process_time_ns() - begin_ns) / 1e6)
    return {name: summary(values) for name, values in samples.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


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


def measure_rates(device: str, dtype: torch.dtype, clock: str = "wall") -> dict[str, float]:
    """Copy bandwidth (bytes read and written per second) and matmul rate (FLOPs per second), at the 20 % quantile."""
    elements = (256 << 20) if device != "cpu" else (16 << 20)
    side = 8192 if device != "cpu" else 1536
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)  # constant operands draw less power: too good a rate
    copy = time_all({"copy": lambda: target.copy_(source)}, device, 15, clock=clock)["copy"].p20
    product = time_all({"matmul": lambda: left @ left}, device, 15, clock=clock)["matmul"].p20
    return {"copy_bytes_per_s": 8e3 * elements / copy, "matmul_flops_per_s": 2e3 * side**3 / product}


def tasks_of(options: argparse.Namespace, sizes: list[Size]) -> list[Task]:
    """In order of worth: batch 1 without torch.compile, then with it near the size of the aims, then the rest."""
    sizes = sorted(sizes, key=lambda s: s.batch * s.num_tokens * (s.num_tokens + 64) * s.width)
    plain = tuple(name for name in options.providers if name != "compile")
    compiled = [name for name in ("eager", "compile", "triton") if name in options.providers]
    single, batched = [s for s in sizes if s.batch == 1], [s for s in sizes if s.batch > 1]
    tasks = [Task(name, size, plain) for size in single for name in options.operations] if plain else []
    after = [Task(name, size, plain) for size in batched for name in options.operations] if plain else []
    if "compile" not in options.providers:
        return tasks + after
    first = sorted(single or sizes, key=lambda s: (s.width, abs(s.num_tokens - 2880)))
    quick = [name for name in options.operations if name not in UNROLLED]
    slow = [name for name in options.operations if name in UNROLLED]
    at_first = [Task(name, first[0], tuple(compiled)) for name in quick]
    later = [Task(name, size, tuple(compiled)) for size in first[1:] for name in quick]
    return tasks + at_first + after + later + [Task(name, first[0], tuple(compiled)) for name in slow]


def measure(task: Task, inputs: Inputs, run: Run) -> Iterator[dict[str, Any]]:
    """One row per provider: measured, or with a `note` that says why not."""
    options, rates = run.options, run.result["rates"]
    case = SETUPS[task.operation](inputs)
    base = _base(task, options)
    floor = 1e3 * max(case.cost.bytes / rates["copy_bytes_per_s"], case.cost.flops / rates["matmul_flops_per_s"])
    base.update(flops=case.cost.flops, bytes=case.cost.bytes, floor_ms=floor)
    calls, memory, gone = {}, {}, {}
    for name, call in providers_of(case, options.device, task.providers).items():
        predicted = run.speeds.get((task.operation, name), 0.0) * floor
        if name in ("eager", "compile") and case.eager_bytes > options.memory_limit:
            gone[name] = f"skipped: the eager path needs about {case.eager_bytes / 2**30:.1f} GiB"
        elif predicted > 1e3 * SLOWEST_CALL[_kind(options.device)]:
            gone[name] = f"skipped: about {predicted / 1e3:.1f} s per call, judged by a smaller size"
        else:
            try:
                memory[name] = extra_memory(call, options.device)
                calls[name] = call
            except torch.OutOfMemoryError:
                gone[name] = ("failed" if name in ("torch", "triton") else "skipped") + ": out of memory"
                _release(options.device)
            except Exception as error:  # recorded, and shown by the exit code
                gone[name] = f"failed: {_in_one_line(error)}"
                _release(options.device)
    for name, note in gone.items():
        yield {**base, "provider": name, "note": note}
    if not calls:
        return
    times = time_all(calls, options.device, options.repeats, clock=options.clock)
    for name, timing in times.items():
        row = {**base, "provider": name, "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
        row.update(runs=timing.runs, extra_bytes=memory[name], share_of_floor=floor / timing.median)
        if "eager" in times:
            row["speed_up_over_eager"] = times["eager"].median / timing.median
            row["memory_share_of_eager"] = memory[name] / max(1, memory["eager"])
        if name in ("torch", "triton"):
            row["is_memory_linear"] = memory[name] <= MEMORY_FACTOR * case.input_bytes + MEMORY_SLACK
        yield row


def _base(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    size = task.size
    return {
        "task": task.label,
        "operation": task.operation,
        "num_tokens": size.num_tokens,
        "width": size.width,
        "batch": size.batch,
        "dtype": str(options.dtype).removeprefix("torch."),
    }


def _release(device: str) -> None:
    """Memory of what failed goes back; raises when the device is lost."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def describe(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers; the load average tells whether the machine was shared."""
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {**environment(device), "load_average": load}


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed-up over eager, one line per operation, one panel per number of tokens; marks say provider and size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if "speed_up_over_eager" in row and row["provider"] != "eager"]
    counts = sorted({row["num_tokens"] for row in shown})
    names = sorted({row["operation"] for row in shown}, reverse=True)
    kinds = sorted({(row["provider"], row["width"], row["batch"]) for row in shown})
    figure, panels = plt.subplots(1, max(1, len(counts)), figsize=(4 * max(1, len(counts)), 5), squeeze=False)
    colours = {"compile": "#999999", "torch": "#3b6ea5", "triton": "#c1440e"}
    marks = "os^vD*<>"
    for panel, count in zip(panels[0], counts, strict=False):
        for place, (provider, width, batch) in enumerate(kinds):
            here = [
                row
                for row in shown
                if (row["num_tokens"], row["provider"], row["width"], row["batch"]) == (count, provider, width, batch)
            ]
            panel.scatter(
                [row["speed_up_over_eager"] for row in here],
                [names.index(row["operation"]) for row in here],
                color=colours[provider],
                marker=marks[place % len(marks)],
                label=f"{provider}, D = {width}, B = {batch}",
            )
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=f"N = {count}", xlabel="times faster than eager", ylim=(-1, len(names)))
        panel.set_yticks(range(len(names)), names if panel is panels[0][0] else [""] * len(names))
        panel.grid(axis="y", linewidth=0.3)
    if counts:
        panels[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]], path: str) -> str:
    """Markdown: `path` ("torch", "triton") against eager, a row per operation and size."""
    lines = [
        f"| operation | N | D | B | eager ms | {path} ms | times faster | eager MiB | {path} MiB | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("operation", "num_tokens", "width", "batch")
    measured = {(*(row[key] for key in order), row["provider"]): row for row in rows if "median_ms" in row}
    for key in sorted({key[:-1] for key in measured if key[-1] == path}):
        mine, eager = measured[*key, path], measured.get((*key, "eager"))
        name, *size = key
        cells = [f"`{name}`", *(str(value) for value in size)]
        if eager is None:
            cells += ["-", _short(mine["median_ms"]), "-", "-", f"{mine['extra_bytes'] / 2**20:.2f}", "-"]
        else:
            cells += [_short(eager["median_ms"]), _short(mine["median_ms"]), f"{mine['speed_up_over_eager']:.2f}"]
            cells += [f"{row['extra_bytes'] / 2**20:.2f}" for row in (eager, mine)]
            cells.append(f"1/{_short(1 / max(1e-9, mine['memory_share_of_eager']))}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vtc.eval.kernel_bench", description=__doc__.splitlines()[0])
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
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for a shared machine"
    )
    parser.add_argument("--memory-limit", type=float, default=None, help="GiB the eager path may take")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds; default 480 on a GPU, none on the CPU")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="default kernels-<device>.json")
    parser.add_argument("--plot", type=pathlib.Path, default=None, help="default: beside --out, as .svg")
    parser.add_argument("--table", type=pathlib.Path, default=None, help="print this stored run as Markdown, and stop")
    parser.add_argument("--resume", action="store_true", help="continue the run that --out holds")
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    if options.clock == "cpu" and not is_cpu:
        parser.error("--clock cpu says nothing about a GPU: use it with --device cpu.")
    options.is_quick = options.quick or (is_cpu and not options.full)
    options.dtype = getattr(torch, options.dtype or ("float32" if is_cpu else "bfloat16"))
    options.providers = options.providers or (["eager", "torch"] if is_cpu else ["eager", "compile", "torch", "triton"])
    free = 8 * 2**30 if is_cpu else 0.8 * torch.cuda.mem_get_info()[0]
    options.memory_limit = free if options.memory_limit is None else options.memory_limit * 2**30
    if options.time_limit is None:
        options.time_limit = math.inf if is_cpu else DEVICE_TIME_LIMIT
    options.out = options.out or pathlib.Path(f"kernels-{_kind(options.device)}.json")
    options.plot = options.plot or options.out.with_suffix(".svg")
    return options


def begin(options: argparse.Namespace, arguments: list[str] | None) -> Run:
    """A new run behind its gate, or the one in the file."""
    if options.resume:
        result = json.loads(options.out.read_text())
        here = environment(options.device)["device"]
        if result["environment"]["device"] != here:
            raise EvaluationError(
                f"{options.out} was measured on {result['environment']['device']!r}, this is {here!r}: "
                "a run can only be resumed on the same device. Leave out --resume or name another --out."
            )
        run = Run(options, result)
        for row in result["rows"]:
            run.note_speed(row)
        return run

    def without(operation: str) -> None:
        rest = [name for name in options.operations if name != operation]
        _recover(options.device, arguments, ["--operations", *rest])

    faults = gate(options.operations, options.providers, options.device, options.dtype, without)
    result = {
        "environment": describe(options.device),
        "clock": options.clock,
        "gate": faults or "green",
        "rates": {},
        "not_measured": [],
        "rows": [],
    }
    if faults:
        print("The correctness gate is red; these operations are not measured.", *faults, sep="\n")
    _release(options.device)
    result["rates"] = measure_rates(options.device, options.dtype, options.clock)
    return Run(options, result)


def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse(arguments)
    if options.table:
        rows = json.loads(options.table.read_text())["rows"]
        print(table(rows, "triton" if any(row["provider"] == "triton" for row in rows) else "torch"))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run = begin(options, arguments)
    gate_result = run.result["gate"]
    broken = set() if gate_result == "green" else {fault.split(":")[0] for fault in gate_result}
    done = {row["task"] for row in run.result["rows"]}
    tokens, widths, batches = (
        (QUICK_TOKENS, QUICK_WIDTHS, QUICK_BATCHES) if options.is_quick else (TOKENS, WIDTHS, BATCHES)
    )
    sizes = [Size(n, d, b) for b in batches for d in widths for n in (options.tokens or tokens)]
    tasks = [t for t in tasks_of(options, sizes) if t.operation not in broken and t.label not in done]
    inputs_of = functools.lru_cache(maxsize=1)(lambda size: Inputs(size, options.dtype, options.device))
    for number, task in enumerate(tasks):
        seconds_left = options.time_limit - (time.perf_counter() - start)
        is_late = seconds_left < (UNROLLED_SECONDS if task.is_unrolled else 0)
        run.result["not_measured"] = [left.label for left in tasks[number:]] if is_late else []
        if is_late:
            print(f"The time limit of {options.time_limit:.0f} s is reached: {len(tasks) - number} cases are left.")
            break
        try:
            for row in measure(task, inputs_of(task.size), run):
                run.add(row)
        except Exception as error:  # a row with the reason, and on to the next case
            run.add({**_base(task, options), "provider": "all", "note": f"failed: {_in_one_line(error)}"})
            run.save()
            _recover(options.device, arguments, ["--resume", "--time-limit", str(max(1.0, seconds_left))])
        run.save()
    run.save()
    return _finish(run, is_red=bool(broken))


def _recover(device: str, arguments: list[str] | None, changes: list[str]) -> None:
    """Goes on after a failure; when the device is lost, a new process continues, with `changes` to the arguments."""
    try:
        _release(device)
    except Exception:
        print("The device is lost; a new process continues.", flush=True)
        given = sys.argv[1:] if arguments is None else arguments
        os.execv(sys.executable, [sys.executable, "-m", "vtc.eval.kernel_bench", *given, *changes])


def _finish(run: Run, *, is_red: bool) -> int:
    rows = run.result["rows"]
    try:
        draw(rows, run.options.plot)
    except ImportError:
        print("No plot: matplotlib is missing (pip install 'vtc-toolkit[plots]'; --resume then draws it).")
    heavy = [row for row in rows if row.get("is_memory_linear") is False]
    failed = [row for row in rows if row.get("note", "").startswith("failed")]
    for row in heavy:
        print(f"{row['task']}: {row['provider']} takes more than O(N D) memory")
    for row in failed:
        print(f"{row['task']}: {row['provider']} {row['note']}")
    return 1 if heavy or failed or is_red else 0


def to_text(result: dict[str, Any]) -> str:
    """JSON with one row per line and four significant digits, so that a change of a row is a change of a line."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    rows = [json.dumps({key: short(value) for key, value in row.items()}) for row in result["rows"]]
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1).removesuffix("\n}")
    return head + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def _print(row: dict[str, Any]) -> None:
    size = f"N={row['num_tokens']:<6d} D={row['width']:<5d} B={row['batch']:<3d}"
    place = f"{row['operation']:26s} {size} {row['provider']:8s}"
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
