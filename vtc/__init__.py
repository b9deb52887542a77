"""vtc: training-free visual-token compression for vision-language models.

handle = vtc.patch(model, "visionzip", budget=64)      # model.generate(...) as before
print(handle.report)
handle.remove()

Names are imported on first use, so that `import vtc` alone, and with it the command line, does not wait for torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from vtc._version import __version__
from vtc.budget import Budget
from vtc.errors import (
    BudgetError,
    EvaluationError,
    InputError,
    MissingExtraError,
    SignalUnavailableError,
    SpecError,
    StateError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    VTCError,
)

if TYPE_CHECKING:
    from vtc import primitives
    from vtc.adapter import Adapter, Picture, register_adapter
    from vtc.catalogue.capabilities import describe
    from vtc.catalogue.registry import create, from_dict, methods, register
    from vtc.companion import ClipCompanion
    from vtc.encoder_report import EncoderReport
    from vtc.engine.patch import EncoderHandle, Handle, compress, compress_encoder, patch, patch_encoder
    from vtc.loading import Loaded, load, open_image
    from vtc.picture import draw, pictures
    from vtc.report import Report
    from vtc.spec import format_spec, parse
    from vtc.stages import Drop, Freeze, Links, Method, Paper, Park, Repeat, Signal, Site, Stage, Weigh
    from vtc.tokenmap import TokenMap
    from vtc.tokens import Layout, Tokens

__all__ = [
    "Adapter",
    "Budget",
    "BudgetError",
    "ClipCompanion",
    "Drop",
    "EncoderHandle",
    "EncoderReport",
    "EvaluationError",
    "Freeze",
    "Handle",
    "InputError",
    "Layout",
    "Links",
    "Loaded",
    "Method",
    "MissingExtraError",
    "Paper",
    "Park",
    "Picture",
    "Repeat",
    "Report",
    "Signal",
    "SignalUnavailableError",
    "Site",
    "SpecError",
    "Stage",
    "StateError",
    "TokenMap",
    "Tokens",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "VTCError",
    "Weigh",
    "__version__",
    "compress",
    "compress_encoder",
    "create",
    "describe",
    "draw",
    "format_spec",
    "from_dict",
    "load",
    "methods",
    "open_image",
    "parse",
    "patch",
    "patch_encoder",
    "pictures",
    "primitives",
    "register",
    "register_adapter",
]

#: module -> what is imported from it on first use; `methods` and `primitives` are packages and found as such
_LAZY = {
    "vtc.adapter": ("Adapter", "Picture", "register_adapter"),
    "vtc.catalogue.capabilities": ("describe",),
    "vtc.catalogue.registry": ("create", "from_dict", "register"),
    "vtc.companion": ("ClipCompanion",),
    "vtc.encoder_report": ("EncoderReport",),
    "vtc.engine.patch": ("EncoderHandle", "Handle", "compress", "compress_encoder", "patch", "patch_encoder"),
    "vtc.loading": ("Loaded", "load", "open_image"),
    "vtc.picture": ("draw", "pictures"),
    "vtc.report": ("Report",),
    "vtc.spec": ("format_spec", "parse"),
    "vtc.stages": ("Drop", "Freeze", "Links", "Method", "Paper", "Park", "Repeat", "Signal", "Site", "Stage", "Weigh"),
    "vtc.tokenmap": ("TokenMap",),
    "vtc.tokens": ("Layout", "Tokens"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"vtc.{name}") is not None:
        return importlib.import_module(f"vtc.{name}")
    raise AttributeError(f"module 'vtc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
