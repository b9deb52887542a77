"""`python -m vtc.eval.kernels`: the gate stops it, and a run leaves complete rows."""

import json

import pytest
import torch

from vtc.eval import kernels as measurement

QUICK = ["--device", "cpu", "--operations", "compact", "cosine_match", "--tokens", "64", "--repeats", "3"]


def test_a_red_gate_measures_nothing(monkeypatch, capsys, tmp_path):
    def broken(inputs):
        case = measurement.cosine_match(inputs)
        return measurement.Case(
            lambda impl: (torch.zeros(1), torch.zeros(1)) if impl == "torch" else case.run(impl),
            case.eager,
            case.cost,
            case.eager_bytes,
            case.input_bytes,
        )

    monkeypatch.setitem(measurement.SETUPS, "cosine_match", broken)
    out = tmp_path / "rows.json"
    assert measurement.main([*QUICK, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "gate is red" in printed
    assert "eager " not in printed
    assert not out.exists()


def test_a_run_leaves_rows_with_times_memory_and_floor(tmp_path):
    out = tmp_path / "rows.json"
    assert measurement.main([*QUICK, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"date", "processor", "threads", "packages"} <= set(result["environment"])
    rows = {(row["operation"], row["provider"]): row for row in result["rows"]}
    assert set(rows) == {(name, path) for name in ("compact", "cosine_match") for path in ("eager", "torch")}
    for row in rows.values():
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["floor_ms"] > 0
    assert all(row["is_memory_linear"] for (_, path), row in rows.items() if path == "torch")


@pytest.mark.parametrize("name", sorted(measurement.SETUPS))
def test_extra_memory_of_the_torch_path_stays_linear(name):
    """The 1024 x 1024 similarities would take 4 MiB, 64 MiB with 16 heads: the paths stay below 1/2 and 1/8 of that."""
    case = measurement.SETUPS[name](measurement.Inputs(measurement.Size(1024, 1024, 1), torch.float32, "cpu"))
    limit = (8 << 20) if name == "received_attention" else (2 << 20)
    assert measurement.extra_memory(lambda: case.run("torch"), "cpu") < limit
