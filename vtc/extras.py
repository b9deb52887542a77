"""Optional packages, probed in one place.

The core needs none of them. Code that does asks `require("gradio")` and gets the module, or an error that names
the extra to install.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

from vtc.errors import MissingExtraError

#: import name -> extra of the distribution that brings it
EXTRA_OF = {
    "av": "video",
    "decord": "video",
    "open_clip": "clip",
    "lmms_eval": "eval",
    "gradio": "demo",
    "matplotlib": "plots",
    "plotly": "plots",
    "sklearn": "scenes",
    "skimage": "scenes",
}


@functools.cache
def available(package: str) -> bool:
    """Whether the optional `package` can be imported (it is not imported)."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> ModuleType:
    """The imported optional `package`.

    Raises:
        MissingExtraError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if package not in EXTRA_OF or available(package):
            raise
        raise missing(package) from error


def missing(package: str) -> MissingExtraError:
    """The error for an optional `package` that is not installed; it names the extra."""
    return MissingExtraError(
        f"{package!r} is not installed. Install it with: pip install 'vtc-toolkit[{EXTRA_OF[package]}]'"
    )
