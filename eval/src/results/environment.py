"""The environment block that goes with every stored number."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch


class Environment(TypedDict):
    """What a stored number was measured with; `commit` ends in "+changes" where files differed from it."""

    date: str
    commit: str | None
    processor: str
    cores: int | None
    python: str
    platform: str
    machine: str
    threads: int
    device: str
    packages: dict[str, str | None]


def environment(device: torch.device | str = "cpu") -> Environment:
    """Versions, processor, accelerator, commit and date of this run."""
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": {name: _version(name) for name in ("vtc-toolkit", "torch", "transformers", "triton", "numpy")},
    }


def _commit() -> str | None:
    """The commit of the source tree that runs, with "+changes" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
