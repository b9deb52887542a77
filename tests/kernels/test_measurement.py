"""`python -m vtc.eval.kernel_bench`: what stops it, what it survives, and what a run leaves."""

import json
import pathlib
import time

import pytest
import torch

from vtc.errors import EvaluationError
from vtc.eval.kernel_bench import measure as measurement
from vtc.eval.kernel_bench.cases import SETUPS, Case, Inputs, Size

QUICK = ["--device", "cpu", "--operations", "compact", "cosine_match", "--tokens", "64", "--repeats", "3"]


@pytest.fixture
def _rates_at_once(monkeypatch):
    rates = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
    monkeypatch.setattr(measurement, "measure_rates", lambda *given: rates)


at_once = pytest.mark.usefixtures("_rates_at_once")


def replaced(name, monkeypatch, **changes):
    """The setup `name` with other callables; `run` gets the real case."""
    real = SETUPS[name]

    def setup(inputs):
        case = real(inputs)
        fields = {key: getattr(case, key) for key in Case.__dataclass_fields__}
        return Case(**{**fields, **{key: change(case) for key, change in changes.items()}})

    monkeypatch.setitem(SETUPS, name, setup)


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@at_once
def test_an_operation_with_a_red_gate_is_not_measured(monkeypatch, capsys, tmp_path):
    wrong = torch.zeros(1), torch.zeros(1)
    replaced("cosine_match", monkeypatch, run=lambda case: lambda impl: wrong if impl == "torch" else case.run(impl))
    out = tmp_path / "rows.json"
    assert measurement.main([*QUICK, "--out", str(out)]) == 1
    assert "gate is red" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {row["operation"] for row in result["rows"]} == {"compact"}
    assert all(fault.startswith("cosine_match: output") for fault in result["gate"])


def test_an_operation_that_raises_in_the_gate_is_a_fault(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(SETUPS, "compact", broken)
    heard = []
    faults = measurement.gate(["compact"], ["eager", "torch"], "cpu", torch.float32, heard.append)
    assert faults == ["compact: RuntimeError: no such kernel"]
    assert heard == ["compact"]


def test_a_run_leaves_rows_with_times_memory_floor_and_a_plot(tmp_path):
    out = tmp_path / "new" / "rows.json"
    assert measurement.main([*QUICK, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"date", "processor", "threads", "packages"} <= set(result["environment"])
    assert result["gate"] == "green"
    assert result["not_measured"] == []
    rows = {(row["operation"], row["provider"]): row for row in result["rows"]}
    assert set(rows) == {(name, path) for name in ("compact", "cosine_match") for path in ("eager", "torch")}
    for row in rows.values():
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["floor_ms"] > 0
    assert all(row["is_memory_linear"] for (_, path), row in rows.items() if path == "torch")
    assert out.with_suffix(".svg").read_text().count("N = 64") == 1


@at_once
def test_a_case_that_fails_leaves_its_reason_and_the_others_their_times(monkeypatch, tmp_path):
    def only_small(case):
        def run(impl):
            if case.input_bytes > 2 * 160 * 128 * 4:
                raise RuntimeError("too large")
            return case.run(impl)

        return run

    replaced("compact", monkeypatch, run=only_small)
    out = tmp_path / "rows.json"
    assert measurement.main([*QUICK, "--out", str(out)]) == 1
    rows = {(row["operation"], row["provider"]): row for row in rows_of(out)}
    assert rows["compact", "torch"]["note"] == "failed: RuntimeError: too large"
    assert "median_ms" in rows["cosine_match", "torch"]


@at_once
def test_what_does_not_fit_or_takes_too_long_is_skipped_with_a_reason(monkeypatch, tmp_path):
    replaced("cosine_match", monkeypatch, eager_bytes=lambda case: 2**40)
    monkeypatch.setitem(measurement.SLOWEST_CALL, "cpu", 1e-9)
    out = tmp_path / "rows.json"
    assert measurement.main([*QUICK, "--tokens", "64", "80", "--out", str(out)]) == 0
    notes = {(row["operation"], row["provider"], row["num_tokens"]): row.get("note") for row in rows_of(out)}
    assert "needs about 1024.0 GiB" in notes["cosine_match", "eager", 64]
    assert notes["cosine_match", "torch", 64] is None
    assert "judged by a smaller size" in notes["cosine_match", "torch", 80]


@at_once
def test_the_time_limit_leaves_a_whole_file_that_a_second_run_completes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.json"
    arguments = [*QUICK, "--out", str(out)]
    written = []
    save = measurement.Run.save
    monkeypatch.setattr(measurement.Run, "save", lambda run: (save(run), written.append(rows_of(out))))
    assert measurement.main([*arguments, "--time-limit", "0"]) == 0
    assert json.loads(out.read_text())["not_measured"] == ["compact N=64 D=1024 B=1", "cosine_match N=64 D=1024 B=1"]
    assert measurement.main([*arguments, "--resume"]) == 0
    assert len(rows_of(out)) == 4
    assert [len(rows) for rows in written] == [0, 2, 4, 4], "every case reaches the file when it is done"
    assert measurement.main([*arguments, "--resume"]) == 0
    assert len(rows_of(out)) == 4


def test_a_run_is_resumed_on_its_own_device_only(tmp_path):
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"environment": {"device": "a GPU"}, "rows": []}))
    with pytest.raises(EvaluationError, match="only be resumed on the same device"):
        measurement.main([*QUICK, "--out", str(out), "--resume"])


def test_a_lost_device_is_continued_in_a_new_process(monkeypatch):
    started = []
    monkeypatch.setattr(measurement, "_release", lambda device: 1 / 0)
    monkeypatch.setattr(measurement.os, "execv", lambda program, arguments: started.append(arguments))
    measurement._recover("cuda", ["--out", "x.json"], ["--resume"])
    assert started[0][1:] == ["-m", "vtc.eval.kernel_bench", "--out", "x.json", "--resume"]


def test_a_gpu_run_puts_batch_one_first_and_slow_compilations_last():
    options = measurement.parse(["--device", "cpu", "--full", "--providers", "eager", "compile", "torch", "triton"])
    sizes = [Size(n, d, b) for b in (32, 1) for d in (3584, 1024) for n in (25088, 2880, 576)]
    tasks = measurement.tasks_of(options, sizes)
    assert len({task.label for task in tasks}) == len(tasks)
    plain = [task.size for task in tasks if "compile" not in task.providers]
    assert plain[0] == Size(576, 1024, 1)
    assert len(plain) == len(SETUPS) * len(sizes)
    compiled = [task for task in tasks if "compile" in task.providers]
    assert compiled[0].size == Size(2880, 1024, 1)
    assert [task.operation for task in tasks[-3:]] == ["dpp_map", "farthest_point", "max_sum"]


def test_the_table_in_the_documentation_is_the_stored_run(capsys):
    root = pathlib.Path(__file__).parents[2]
    assert measurement.main(["--device", "cpu", "--table", str(root / "benchmarks" / "kernels-cpu.json")]) == 0
    assert capsys.readouterr().out in (root / "docs" / "kernels.md").read_text()


def test_the_stored_run_meets_the_aims_for_the_cpu():
    """Never slower than eager at 2880 tokens and more, and at most a tenth of its memory."""
    stored = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernels-cpu.json"
    rows = [row for row in rows_of(stored) if row["provider"] == "torch" and row["num_tokens"] >= 2880]
    assert {row["operation"] for row in rows} == set(SETUPS)
    assert all(row["is_memory_linear"] for row in rows)
    compared = [row for row in rows if "speed_up_over_eager" in row]
    assert len(compared) >= 2 * len(SETUPS) - 1, "only eager attention over 6272 tokens does not fit"
    assert all(row["speed_up_over_eager"] >= 1 for row in compared)
    assert all(row["memory_share_of_eager"] <= 0.1 for row in compared)


every = pytest.mark.parametrize("name", sorted(SETUPS))


@every
def test_extra_memory_of_the_torch_path_is_linear(name):
    """At 6144 tokens of width 64 one float32 matrix takes 144 MiB, the input 1.5 MiB, and the largest tile 2.3 MiB."""
    case = SETUPS[name](Inputs(Size(6144, 64, 1), torch.float32, "cpu"))
    assert measurement.extra_memory(lambda: case.run("torch"), "cpu") < 3 * case.input_bytes + (3 << 20)


@every
def test_the_torch_path_takes_at_most_a_tenth_of_the_memory_of_eager(name):
    width = 256 if name == "received_attention" else 1024  # eager attention of 16 heads would take 1.6 GiB
    case = SETUPS[name](Inputs(Size(2880, width, 1), torch.float32, "cpu"))
    eager = measurement.extra_memory(case.eager, "cpu")
    assert measurement.extra_memory(lambda: case.run("torch"), "cpu") < eager / 10


def test_processor_time_leaves_out_what_a_call_waited():
    calls = {"wait": lambda: time.sleep(0.02)}
    assert measurement.time_all(calls, "cpu", 3)["wait"].median >= 20
    assert measurement.time_all(calls, "cpu", 3, clock="cpu")["wait"].median < 10


def test_memory_is_measured_and_not_computed():
    def wasteful():
        return torch.ones(1 << 20).mul(2.0).sum()  # two float32 tensors of 4 MiB live at once

    assert 8 << 20 <= measurement.extra_memory(wasteful, "cpu") < 9 << 20
