"""vtc: training-free visual-token compression for vision-language models.

handle = vtc.patch(model, "visionzip", budget=64)      # model.generate(...) as before
print(handle.report)
handle.remove()
"""

from vtc import methods as _methods  # registers every method
from vtc._version import __version__
from vtc.catalogue.capabilities import describe
from vtc.catalogue.registry import create, from_dict, methods, register
from vtc.companion import ClipCompanion
from vtc.encoder_report import EncoderReport
from vtc.engine import EncoderHandle, Handle, compress, compress_encoder, patch, patch_encoder
from vtc.errors import VTCError
from vtc.report import Report
from vtc.spec import format_spec, parse
from vtc.stages import Drop, Freeze, Links, Method, Paper, Park, Repeat, Signal, Site, Stage, Weigh
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout, Tokens

__all__ = [
    "Budget",
    "ClipCompanion",
    "Drop",
    "EncoderHandle",
    "EncoderReport",
    "Freeze",
    "Handle",
    "Layout",
    "Links",
    "Method",
    "Paper",
    "Park",
    "Repeat",
    "Report",
    "Signal",
    "Site",
    "Stage",
    "TokenMap",
    "Tokens",
    "VTCError",
    "Weigh",
    "__version__",
    "compress",
    "compress_encoder",
    "create",
    "describe",
    "format_spec",
    "from_dict",
    "methods",
    "parse",
    "patch",
    "patch_encoder",
    "register",
]
del _methods
