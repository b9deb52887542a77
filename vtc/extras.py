"""Optional packages, probed in one place.

The core needs none of them. Code that does asks `require("gradio")` and gets the module, or an error that names
the extra to install.
"""

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
    "sklearn": "scenes",
    "skimage": "scenes",
}


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
        extra = EXTRA_OF.get(package)
        if extra is None or available(package):
            raise
        raise MissingExtraError(
            f"{package!r} is not installed. Install it with: pip install 'vtc-toolkit[{extra}]'"
        ) from error
