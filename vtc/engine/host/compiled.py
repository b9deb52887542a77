"""Compiled models: compiled code is not guarded against new hooks, so a patch on it could be silently skipped."""

import inspect
import sys

from torch import nn

from vtc.errors import UnsupportedFeatureError


def refuse_compiled(model: nn.Module) -> None:
    """Refuse models of which a part is compiled already.

    Compiling after the patch is fine: the hooks are traced, or break the graph.

    Raises:
        UnsupportedFeatureError: a part is compiled, or code of its class is in the cache of the compiler.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            part = f"its part {name!r}" if name else "this model"
            raise UnsupportedFeatureError(
                f"{part} is compiled: compiled code does not look at hooks that come later. "
                "Patch and use the uncompiled model, or compile it after the patch."
            )
    cached = sorted({type(module).__name__ for module in model.modules() if _has_compiled_code(type(module))})
    if cached:
        raise UnsupportedFeatureError(
            f"{', '.join(cached)}: their forward was compiled in this process, and compiled code does not look at "
            "hooks that come later. Call torch._dynamo.reset() first; compile again after the patch if you want to."
        )


def _has_compiled_code(cls: type[nn.Module]) -> bool:
    """Whether the compiler holds code of the forward of `cls`, here or behind decorators."""
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._C._dynamo import eval_frame

    functions = {cls.forward, inspect.unwrap(cls.forward)}
    codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
    return any(eval_frame._debug_get_cache_entry_list(code) for code in codes)
