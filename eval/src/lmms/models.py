"""lmms-eval's own model classes with a patch on top: one mixin, and a class for each base, built when it is asked for.

`chat_llava_hf` is lmms-eval's chat class of `llava_hf`, `simple_qwen2_vl` its simple class of `qwen2_vl`, and so on for
every entry of `BASES`. lmms-eval reaches them through the entry point in `vtc.eval.lmms.entry`.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch

from vtc.errors import EvaluationError, MissingExtraError, UnsupportedModelError
from vtc.eval.lmms.timings import columns, flat
from vtc.eval.lmms.watch import Watch, must_not_be_swallowed
from vtc.loading import embedded_path
from vtc.spec import parse

#: lmms-eval's model id -> `config.model_type` of the stock classes that it loads
BASES: dict[str, tuple[str, ...]] = {
    "llava_hf": ("llava", "llava_next", "llava_onevision"),
    "qwen2_vl": ("qwen2_vl",),
    "qwen2_5_vl": ("qwen2_5_vl",),
    "qwen3_vl": ("qwen3_vl",),
    "internvl_hf": ("internvl",),
    "gemma3": ("gemma3",),
    "video_llava": ("video_llava",),
}
#: our id of the embedded model, which is `llava_hf` with a default for `pretrained`
EMBEDDED = "scenes_llava"
PREFIX = "vtc_"
KINDS = ("simple", "chat")


def base_of(model_type: str) -> str:
    """The lmms-eval model id that loads a `config.model_type`.

    Raises:
        UnsupportedModelError: none does.
    """
    for base, types in BASES.items():
        if model_type in types:
            return base
    known = ", ".join(sorted(name for types in BASES.values() for name in types))
    raise UnsupportedModelError(
        f"lmms-eval has no class for model type {model_type!r} that vtc wraps. Wrapped: {known}. "
        "`vtc bench --model` runs every family of `vtc models`."
    )


class Compressed:
    """The mixin: patches the model after loading, measures it, and makes failures end the run.

    Args:
        method, budget, positions, size_bias: as for `vtc.patch`; without a method the model stays dense. A spec with
            commas needs quotes in `--model_args`.
        device: "cpu", "cuda", ...; None: a GPU if there is one.

    Everything else goes to lmms-eval's class. Models are placed on one device each, as patched models must be.
    """

    #: whether lmms-eval may drop the model at the end of an evaluation, as it does with its own
    keep_loaded = False

    def __init__(
        self,
        *args: Any,
        method: str | None = None,
        budget: int | float | str | None = None,
        positions: str = "auto",
        size_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        with must_not_be_swallowed(f"setting up {type(self).__name__}"):
            spec = None if method is None else method.strip("\"'")
            if spec is not None:
                parse(spec, budget)  # a typing error shows before anything is loaded
            super().__init__(*args, **_on_one_device(kwargs))
            self.watch = Watch(self.model)  # type: ignore[attr-defined]
            self.watch.patch(spec, budget, **({"positions": positions, "size_bias": size_bias} if spec else {}))

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers of the requests, from lmms-eval's class.

        Raises:
            RunFailed: an error was raised anywhere, or requests were answered without the model.
        """
        return self._watched(super().generate_until, requests)  # type: ignore[misc]

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """As `generate_until`, in several rounds."""
        return self._watched(super().generate_until_multi_round, requests)  # type: ignore[misc]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Log-likelihoods, from lmms-eval's class."""
        with must_not_be_swallowed("loglikelihood"):
            answers: list[Any] = super().loglikelihood(requests)  # type: ignore[misc]
        return answers

    def clean(self) -> None:
        """What lmms-eval calls when all requests are answered."""
        if not self.keep_loaded:
            self.watch.close()
            del self.watch
            super().clean()  # type: ignore[misc]

    def _watched(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        done = len(self.watch.requests)
        with must_not_be_swallowed("generate_until"):
            answers = answer(requests)
            measured = self.watch.requests[done:]
            if len(measured) < math.ceil(len(requests) / int(self.batch_size)):  # type: ignore[attr-defined]
                raise EvaluationError(
                    f"{len(requests)} requests were answered with {len(measured)} calls of generate: lmms-eval "
                    "swallowed an error on the way to the model (a video that cannot be read?), see its log."
                )
        log_metrics(0.0, 0, 0.0, flat(columns(measured)))
        return answers


class Embedded:
    """The mixin of `vtc_scenes_llava`: loads the model that ships with the package."""

    def __init__(self, *args: Any, pretrained: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, pretrained=pretrained or str(embedded_path()), **kwargs)  # type: ignore[call-arg]


def _on_one_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Model arguments with a device and a device map that lmms-eval's classes and a patch both accept.

    Some of them default to "auto", which may spread or offload the model, and one to "", which transformers 5 refuses.
    """
    device = str(kwargs.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # with several GPU processes the classes choose `cuda:<local rank>` themselves, llava_hf only if the map is empty
    return {"device_map": "" if several and device.startswith("cuda") else device, **kwargs, "device": device}


@functools.cache
def wrapped(kind: str, base: str) -> type:
    """lmms-eval's `kind` ("simple" or "chat") class of `base`, with the mixin in front.

    Raises:
        MissingExtraError: a package that lmms-eval's module needs is not installed.
    """
    from lmms_eval.models import get_model_manifest

    if base == EMBEDDED:
        return type(f"{kind}_{base}", (Embedded, wrapped(kind, "llava_hf")), {"__module__": __name__})
    manifest = get_model_manifest(base)
    module, _, name = (manifest.chat_class_path if kind == "chat" else manifest.simple_class_path).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingExtraError(
            f"lmms-eval's {base!r} cannot be imported: {error}. Install what is missing; for decord on macOS or ARM: "
            "pip install eva-decord, or decord2."
        ) from error
    about = {"__module__": __name__, "__doc__": f"`{module}.{name}` with a patch; see `Compressed`."}
    return type(f"{kind}_{base}", (Compressed, cls), about)


def __getattr__(name: str) -> type:
    kind, _, base = name.partition("_")
    if kind not in KINDS or base not in (*BASES, EMBEDDED):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # lmms-eval's command line would exit with code 0 after an ImportError
    with must_not_be_swallowed(f"loading {name}"):
        return wrapped(kind, base)
