"""Which implementation runs, why, and how an operation becomes visible to `torch.compile` and FLOP counters.

`choose_path` is the only probe of the package. It reads the environment when an operation runs, never at import:
`VTC_KERNELS=torch|triton` forces a path, `TRITON_INTERPRET=1` (set before the first kernel runs) lets Triton kernels
run on CPU tensors. `@lazy_jit` keeps `triton` out of the import: the kernel is handed to Triton at its first launch.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ENVIRONMENT_VARIABLE = "VTC_KERNELS"
PATHS = ("torch", "triton")
COMPILE_OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 changes the default
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger("vtc.kernels")


class Cost(NamedTuple):
    """Floating point operations (2 per multiply-add) and bytes an operation must at least move."""

    flops: int
    bytes: int


class Path(NamedTuple):
    """The path that runs (`torch` or `triton`) and the reason in words."""

    name: str
    reason: str


def choose_path(tensor: Tensor, impl: str | None = None) -> Path:
    """Says which path an operation on `tensor` takes, and why.

    Order: the `impl` argument, the variable `VTC_KERNELS`, then Triton on CUDA and ROCm and torch elsewhere. A path
    that was forced but cannot run raises instead of falling back.

    >>> choose_path(torch.zeros(1), impl="torch")
    Path(name='torch', reason="impl='torch' was asked for")
    """
    if impl is not None:
        return _forced(tensor, impl, f"impl={impl!r} was asked for")
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if setting:
        return _forced(tensor, setting, f"{ENVIRONMENT_VARIABLE}={setting} forces it")
    obstacle = _triton_obstacle(tensor)
    if obstacle is None and tensor.device.type == "cuda":
        return Path("triton", "Triton is installed and the tensor is on a CUDA or ROCm device")
    reason = obstacle or "Triton interprets kernels here, which is for tests only"
    _say_once(reason)
    return Path("torch", reason)


def _forced(tensor: Tensor, name: str, reason: str) -> Path:
    if name not in PATHS:
        raise ValueError(
            f"Path {name!r} ({reason}) is unknown: choose one of 'reference' (as impl=), 'torch', 'triton'."
        )
    obstacle = _triton_obstacle(tensor) if name == "triton" else None
    if obstacle is not None:
        raise RuntimeError(f"Path 'triton' cannot run although {reason}: {obstacle}. Use impl='torch'.")
    return Path(name, reason)


def _triton_obstacle(tensor: Tensor) -> str | None:
    """Why Triton cannot take this tensor, or None when it can."""
    if not has_triton():
        return "Triton is not installed"
    if tensor.dtype not in TRITON_DTYPES:
        return f"the Triton kernels do not take {tensor.dtype}"
    if tensor.device.type != "cuda" and not is_interpreting():
        return f"the tensor is on {tensor.device.type} and TRITON_INTERPRET=1 is not set"
    return None


@functools.cache
def has_triton() -> bool:
    """True when `triton` can be imported; it is not imported by asking."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """True when `TRITON_INTERPRET` asks Triton to run kernels as Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _say_once(reason: str) -> None:
    _log.info("vtc.kernels runs its torch path: %s", reason)


def register(name: str, *, fake: Callable[..., Any], flops: Callable[..., int]) -> Callable[..., Any]:
    """Decorator: registers `vtc::<name>` as an opaque operator with shape inference and a FLOP formula.

    `flops` receives the operator's arguments with every tensor replaced by its shape. Operators have no gradient: this
    toolkit is training-free.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"vtc::{name}", function, mutates_args=())
        operator.register_fake(fake)

        def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return flops(*args, **kwargs)

        register_flop_formula(getattr(torch.ops.vtc, name))(formula)
        return operator

    return decorate


class _TritonLanguage:
    """Stands for `triton.language` until the first launch; only what a signature needs exists."""

    constexpr = "tl.constexpr"


tl: Any = _TritonLanguage()


class LazyKernel:
    """A Triton kernel that is handed to `triton.jit` when it is first launched.

    The module that defines it needs `tl` from this file among its globals. At the first launch `tl` and the device
    functions that the kernel calls are replaced by the real things there, because Triton looks names up in the globals.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._compiled: Any = None

    def compiled(self) -> Any:
        """The `triton.JITFunction` (or its interpreted form)."""
        if self._compiled is None:
            names = self.function.__globals__
            names["tl"] = importlib.import_module("triton.language")
            self._compiled = importlib.import_module("triton").jit(self.function)
            for name in self.function.__code__.co_names:
                value = names.get(name)
                if isinstance(value, LazyKernel):
                    names[name] = value.compiled()
        return self._compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launcher: Callable[..., Any] = self.compiled()[grid]
        return launcher if is_interpreting() else functools.partial(launcher, **COMPILE_OPTIONS)


def lazy_jit(function: Callable[..., None]) -> Any:
    """Like `triton.jit`, but Triton is imported at the first launch, so that the module imports without it."""
    return LazyKernel(function)


def cdiv(numerator: int, denominator: int) -> int:
    """Ceiling of the quotient."""
    return -(-numerator // denominator)


def next_power_of_two(value: int) -> int:
    """Smallest power of two that is at least `value` and at least 1."""
    return 1 << max(0, value - 1).bit_length()
