"""The Triton kernels: interpreted in a process of their own, compiled ahead of time for sm_90, and on a device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from vtc.kernels._dispatch import has_triton

HERE = pathlib.Path(__file__).parent
CASES = [sys.executable, "-m", "pytest", "--noconftest", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")


def run(command, **environment):
    settings = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "VTC_KERNELS")}
    settings.update(OMP_NUM_THREADS="1", TRITON_DEFAULT_FP_FUSION="1", **environment)
    root = HERE.parent.parent
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), settings.get("PYTHONPATH")]))
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=root, check=False)


@needs_triton
def test_interpreted_kernels_agree_with_the_reference():
    done = run(CASES, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_compiled_kernels_agree_with_the_reference():
    done = run(CASES)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_every_kernel_compiles_for_sm90_without_a_device():
    done = run([sys.executable, str(HERE / "compile_sm90.py")])
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert all(kernel["shared_bytes"] <= 227 * 1024 for kernel in compiled), "more shared memory than an H100 has"
    names = {kernel["kernel"].removeprefix("vtc.kernels.") for kernel in compiled}
    written = {
        f"{file.stem}.{line.split('(')[0].removeprefix('def ')}"
        for file in (HERE.parent.parent / "kernels" / "src").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert names == written
    matrix = {kernel["kernel"] for kernel in compiled if kernel["matrix_instructions"]}
    assert "vtc.kernels.cosine_match._match_kernel" in matrix
