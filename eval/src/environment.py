"""The environment block that goes with every stored number."""

import platform
from importlib import metadata
from typing import Any

import torch


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, processor and accelerator of this run."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": {name: _version(name) for name in ("vtc-toolkit", "torch", "transformers", "triton", "numpy")},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
