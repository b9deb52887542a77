"""Every error that vtc raises on purpose.

    VTCError
    |-- BudgetError(ValueError)                    a budget that cannot be met
    |-- SpecError(ValueError)                      a method, option or spec string that does not exist or parse
    |-- InputError(ValueError)                     an image, prompt or tensor that cannot be compressed
    |-- UnsupportedModelError(TypeError)           no adapter for this model
    |-- SignalUnavailableError(LookupError)        the model cannot give what the method reads
    |-- StateError(RuntimeError)                   patched twice, used after removal, foreign cache
    |-- UnsupportedFeatureError(NotImplementedError)  a generation feature that would be silently wrong
    |-- MissingExtraError(ImportError)             an optional package is not installed
    |-- EvaluationError(RuntimeError)              an evaluation that failed, or whose scores would be wrong

A message says what was wrong (with the value), what is allowed and what to do.
"""

import difflib
from collections.abc import Iterable


class VTCError(Exception):
    """Base class: ``except vtc.VTCError`` catches everything raised on purpose."""


class BudgetError(VTCError, ValueError):
    """A token budget is malformed or cannot be met."""


class SpecError(VTCError, ValueError):
    """A method name, an option or a spec string does not exist or does not parse."""


class InputError(VTCError, ValueError):
    """Input data cannot be compressed: undecodable image, NaN features, placeholder mismatch."""


class UnsupportedModelError(VTCError, TypeError):
    """No adapter knows this model, or the model is not in a state that can be patched."""


class SignalUnavailableError(VTCError, LookupError):
    """A stage reads a signal that this model or site cannot give."""


class StateError(VTCError, RuntimeError):
    """The model, handle or cache is not in the state that the call needs."""


class UnsupportedFeatureError(VTCError, NotImplementedError):
    """A combination that vtc refuses because its result would be wrong."""


class MissingExtraError(VTCError, ImportError):
    """An optional package is needed and not installed."""


class EvaluationError(VTCError, RuntimeError):
    """An evaluation failed, or its scores would be wrong."""


def unknown_name(kind: str, name: str, known: Iterable[str], list_with: str) -> SpecError:
    """The error for a name that does not exist, with the nearest known one.

    Example:
        >>> str(unknown_name("method", "fastvv", ["fastv", "dart"], "vtc methods"))
        "unknown method 'fastvv'. Did you mean 'fastv'? `vtc methods` lists all."
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return SpecError(f"unknown {kind} {name!r}.{hint} `{list_with}` lists all.")
