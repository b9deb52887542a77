"""Watches the `generate` calls of one model: times them, counts tokens, and lets none of their errors be swallowed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from vtc.adapter import unwrap
from vtc.engine import Handle, patch
from vtc.errors import EvaluationError, StateError

#: inputs of a model that hold pixels; a call with one of them must have been compressed
PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")


class RunFailed(BaseException):
    """An error that must end an lmms-eval run; its `__cause__` is what went wrong.

    lmms-eval catches every `Exception` of `generate` in some of its models and scores the answer as empty, and its
    command line catches every `Exception` of a run and exits with code 0. So this is none.
    """


@contextmanager
def must_not_be_swallowed(doing: str) -> Iterator[None]:
    """Turn every exception of the block into `RunFailed`, which names what was being done."""
    try:
        yield
    except Exception as error:
        raise RunFailed(f"{doing}: {type(error).__name__}: {error}") from error


class Watch:
    """Stands in front of `model.generate` until `close`.

    Args:
        model: the loaded model; `patch` compresses it.

    `requests` holds one record per call with the milliseconds from the call to the first token (`ttft_ms`, the
    vision tower included), of each further token (`tpot_ms`, None if there was none), of deciding and applying
    (`selection_ms`), the tokens before and after (samples of a batch averaged), FLOPs and KV bytes of the prefill.
    """

    def __init__(self, model: Any) -> None:
        self.model = cast(Any, unwrap(model))
        self.handle: Handle | None = None
        self.requests: list[dict[str, Any]] = []
        self._forwards: list[float] = []
        self._generate = self.model.generate
        self._hook = self.model.register_forward_hook(self._after_forward)
        self.model.generate = self._watched

    def patch(self, spec: str | None, budget: Any = None, **options: Any) -> None:
        """Compress from now on, in place of the patch before; None is the dense model.

        Raises:
            VTCError: whatever `vtc.patch` refuses; the model is dense then.
        """
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if spec is not None:
            self.handle = patch(self.model, spec, budget, **options)

    def close(self) -> None:
        """Give the model back as it was."""
        self.patch(None)
        self._hook.remove()
        self.model.__dict__.pop("generate", None)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        spec = self.handle.spec if self.handle is not None else "the dense model"
        with must_not_be_swallowed(f"request {len(self.requests) + 1} with {spec}"):
            self._forwards.clear()
            self._wait()
            start = time.perf_counter()
            ids = self._generate(*args, **kwargs)
            self.requests.append(self._record(start, any(kwargs.get(name) is not None for name in PIXELS)))
        return ids

    def _after_forward(self, *_: Any) -> None:
        # only the first two are needed apart from the last, and waiting for a GPU in between would slow it down
        if not self._forwards:
            self._wait()
        self._forwards.append(time.perf_counter())

    def _record(self, start: float, has_pixels: bool) -> dict[str, Any]:
        self._wait()
        end = time.perf_counter()
        if not self._forwards:
            raise EvaluationError("generate returned without one forward pass, so nothing was measured.")
        steps = len(self._forwards) - 1
        first = self._forwards[0]
        record: dict[str, Any] = {
            "ttft_ms": (first - start) * 1e3,
            "tpot_ms": (end - first) * 1e3 / steps if steps else None,
            "new_tokens": steps + 1,
        }
        if self.handle is None or not has_pixels:
            return record
        try:
            report = self.handle.report
        except StateError as error:
            raise EvaluationError(
                f"{self.handle.spec} is patched, and a call with pixels was not compressed. Please report this model."
            ) from error
        samples = len(report.visual_tokens)
        return record | {
            "selection_ms": sum(report.selection_ms.values()),
            "before": sum(report.visual_tokens) / samples,
            "entering_llm": sum(report.entering) / samples,
            "after_last_cut": sum(report.after_last_cut) / samples,
            "layer_average": sum(report.layer_average) / samples,
            "flops": report.flops / samples,
            "flops_dense": report.flops_dense / samples,
            "kv_bytes": report.kv_bytes / samples,
            "kv_bytes_dense": report.kv_bytes_dense / samples,
        }

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
