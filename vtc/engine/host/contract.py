"""What vtc needs of the installed transformers, checked at the patch: a host that nobody tested is refused.

Two checks, both before anything changes. The version must lie in the range that `scripts/verify-versions` ran
(docs/compatibility.md). And the signatures of the outer model, the inner model, the language model, a decoder layer and
its attention must have the words of `vtc.engine.host.names`, and the cache class the members that
`vtc.engine.host.cache` uses. Signatures are looked at once per class.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from packaging.version import Version
from torch import nn

from vtc.adapter import Adapter
from vtc.engine.host import cache, names
from vtc.errors import UnsupportedModelError

#: the tested versions of transformers: from the first on, below the second; pyproject.toml has the same
TESTED = ("5.19", "5.25")

#: set to 1 to patch models on a version outside the range, once `vtc doctor --self-check` has passed there; the words
#: are checked all the same
SWITCH = "VTC_UNTESTED_HOST"

#: ends every message about a host that does not do what its version's contract says
REPORT_IT = "Run `vtc doctor --self-check` and report what it prints; until then, call handle.remove()."

_UNTESTED: ContextVar[bool] = ContextVar("vtc_untested_host", default=False)

#: what each part must take; the KV cache, whose word changes, comes on top
WORDS = {
    "outer model": (names.INPUT_IDS, names.ATTENTION_MASK, names.INPUTS_EMBEDS, names.LOGITS_TO_KEEP),
    "inner model": (names.INPUT_IDS, names.ATTENTION_MASK, names.INPUTS_EMBEDS, names.ENCODER_OUTPUTS),
    "language model": (names.INPUTS_EMBEDS, names.ATTENTION_MASK, names.POSITION_IDS),
    "decoder layer": (names.HIDDEN_STATES, names.ATTENTION_MASK, names.POSITION_IDS, names.POSITION_EMBEDDINGS),
    "attention": (names.HIDDEN_STATES, names.ATTENTION_MASK, names.POSITION_EMBEDDINGS),
}


def check(adapter: Adapter) -> None:
    """Refuse a model whose host has changed its words.

    Raises:
        UnsupportedModelError: a version outside the tested range, or a word or member that is missing, named.
    """
    check_version()
    _check_cache()
    for role, module in _parts(adapter):
        more = (*WORDS[role], *adapter.words.get(role, ()))
        if role == "outer model" and module is adapter.inner:
            continue  # a model without LM head; the inner model's words are what counts
        known = names.parameters(module)
        if known:
            cls: Any = type(module)
            _check_words(known, cls, role, more)
    for encoder in adapter.encoders:
        if not callable(getattr(adapter.inner, encoder.method, None)):
            raise _refused(f"{type(adapter.inner).__name__} has no method {encoder.method!r}")


def check_version() -> None:
    """Refuse versions of transformers that were not tested.

    Raises:
        UnsupportedModelError: it says which are, and how to go on with this one.
    """
    if not is_untested_allowed() and not is_tested(installed()):
        raise UnsupportedModelError(
            f"transformers {installed()} is outside the tested range {tested_range()}: a change of its "
            f"internals would make answers silently wrong. Install a tested one: pip install 'transformers"
            f"{tested_range()}'. Or run `vtc doctor --self-check`, and if it passes, set {SWITCH}=1 to "
            "patch models on this version."
        )


def installed() -> str:
    """The installed version of transformers."""
    import transformers  # here, because it takes a second

    return transformers.__version__


def is_untested_allowed() -> bool:
    """Whether the user, or `untested`, takes any version; the words are checked all the same."""
    return _UNTESTED.get() or os.environ.get(SWITCH, "") not in ("", "0")


@contextlib.contextmanager
def untested() -> Iterator[None]:
    """Patch on any version inside the block: how the self check tries one that nobody tested."""
    token = _UNTESTED.set(True)
    try:
        yield
    finally:
        _UNTESTED.reset(token)


def tested_range() -> str:
    """The range as pip writes it."""
    return f">={TESTED[0]},<{TESTED[1]}"


@functools.cache
def is_tested(version: str) -> bool:
    """Whether a version of transformers lies in the tested range; previews of a later minor do not."""
    here = Version(version)
    return Version(TESTED[0]) <= here and here.release[:2] < Version(TESTED[1]).release[:2]


def is_older(than: str) -> bool:
    """Whether the installed transformers comes before the version `than`."""
    return bool(than) and Version(installed()) < Version(than)


def _parts(adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose words matter, by what they are."""
    found: list[tuple[str, Callable[[], Any]]] = [
        ("outer model", lambda: adapter.model),
        ("inner model", lambda: adapter.inner),
        ("language model", lambda: adapter.language_model),
        ("decoder layer", lambda: adapter.layers[0]),
        ("attention", lambda: adapter.projections(0)[0]),
    ]
    for role, part in found:
        try:
            yield role, part()
        except (AttributeError, IndexError) as error:
            raise _refused(f"the {role} of {type(adapter.model).__name__} is not where it was: {error}") from error


@functools.cache
def _check_words(known: tuple[str, ...], owner: Any, role: str, words: tuple[str, ...]) -> None:
    missing = [repr(word) for word in words if word not in known]
    if not any(word in known for word in names.CACHE_WORDS):
        missing.append(f"KV cache ({' or '.join(map(repr, names.CACHE_WORDS))})")
    if missing:
        expected = {*words, *names.CACHE_WORDS}
        others = [repr(name) for name in known if name not in expected]
        raise _refused(
            f"{owner.__name__}.forward ({role}) takes no {', no '.join(missing)}; beside the words that vtc knows it "
            f"takes {', '.join(others) or 'nothing'}",
            ""
            if owner.__module__.startswith("transformers.")
            else f"{owner.__name__} is no class of transformers: let its forward take them, or hand on **kwargs alone.",
        )


@functools.cache
def _check_cache() -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    for made, members in ((DynamicCache(), cache.MEMBERS), (DynamicLayer(), cache.LAYER_MEMBERS)):
        missing = [repr(name) for name in members if not hasattr(made, name)]
        if missing:
            raise _refused(f"{type(made).__name__} has no {', no '.join(missing)}")
    for name, parameters in cache.ASKED.items():
        known = list(inspect.signature(getattr(DynamicCache, name)).parameters)[1:]
        if known[: len(parameters)] != list(parameters):
            raise _refused(f"DynamicCache.{name} takes ({', '.join(known)}), not ({', '.join(parameters)})")


def _refused(what: str, how: str = "") -> UnsupportedModelError:
    how = how or f"It was tested with transformers{tested_range()}: install one of these, or a newer vtc."
    return UnsupportedModelError(
        f"transformers {installed()}: {what}. vtc would compress this model wrongly, so it does not. {how}"
    )
