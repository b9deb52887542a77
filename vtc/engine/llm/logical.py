"""What a shortened KV cache answers its host: lengths as if nothing had been dropped.

What vtc knows lives on the cache object, so generations do not mix. The host sees the *logical* length: positions,
prompt slicing and second turns go on unchanged. Masks are sized by what the reference layer really holds.
"""

from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vtc.engine.handover import ATTRIBUTE
from vtc.engine.host import cache as host
from vtc.engine.llm.held import Memory
from vtc.engine.plan import Plan
from vtc.errors import StateError, UnsupportedFeatureError

#: the memory that the running forward of a patched model follows
READING: ContextVar[Memory | None] = ContextVar("vtc_reading", default=None)


def recall(cache: Any, plan: Plan, batch: int) -> Memory | None:
    """What the layers of `cache` hold by now, which the running call may read; None: everything, or there is none.

    Raises:
        StateError: the cache was made under another patch, or its batch changed.
    """
    READING.set(None)
    memory: Memory | None = getattr(cache, ATTRIBUTE, None)
    if memory is None or host.held_length(cache) == 0:
        return None
    if memory.plan is not plan:
        raise StateError(
            "this KV cache was compressed under another patch (or was pickled, which cuts its tie to the patch). "
            "Continue under the patch that made it, or start with a new cache."
        )
    made_for = len(memory.reference.column)
    if made_for != batch:
        raise StateError(
            f"this compressed KV cache was made for {made_for} prompts and is used for {batch}. "
            "Expand the inputs before the first forward (num_return_sequences, num_beams), not the cache."
        )
    READING.set(memory)
    return memory.grown(host.held_length(cache, plan.reference))


def remember(cache: Any, memory: Memory) -> None:
    """Attach `memory` to `cache` and let the cache report logical lengths."""
    setattr(cache, ATTRIBUTE, memory)
    # one width for every mask, that of the reference layer, whichever layer the host sizes it by
    host.answer(
        cache,
        length=_logical_length,
        offset=_reference_length,
        mask_sizes=_mask_sizes,
        crop=_crop,
        select=_select,
        reset=_forget,
    )


def check_cache(cache: Any) -> None:
    """Refuse caches whose entries cannot be dropped.

    Raises:
        UnsupportedFeatureError: a static cache.
    """
    if cache is not None and host.is_static(cache):
        raise UnsupportedFeatureError(
            f"{type(cache).__name__}: its entries have fixed places, so dropped tokens would still be attended to. "
            "Use the default DynamicCache (no cache_implementation='static')."
        )


def _reference_length(cache: Any, layer_idx: int = 0) -> int:
    return host.held_length(cache, getattr(cache, ATTRIBUTE).plan.reference)


def _mask_sizes(cache: Any, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    """What the host asks at every call: the place to notice that no hook of ours will cut what it makes.

    Raises:
        StateError: the call does not go through the patched model.
    """
    if READING.get() is not getattr(cache, ATTRIBUTE):
        raise StateError(
            "this KV cache is compressed, and the model that reads it is not the one whose patch made it (a patch that "
            "was taken off, a copy, or a language model called by itself), so it would read entries at wrong places. "
            "Continue with the patched model (inside the `with` block), or prefill again."
        )
    return _reference_length(cache) + query_length, 0


def _logical_length(cache: Any, layer_idx: int = 0) -> int:
    memory: Memory = getattr(cache, ATTRIBUTE)
    held = host.held_length(cache, layer_idx)
    return held and held - memory.layers[layer_idx].column.shape[1] + memory.length


def _crop(cache: Any, length: int | Tensor) -> None:
    """`cache.crop`, by logical columns: `-n` takes off the last n; n > 0 (older hosts) leaves the first n.

    Assisted decoding verifies its candidates together with the prompt, so what is cropped may be part of the memory.

    Raises:
        StateError: some of these columns were dropped, so layers would lose different tokens.
    """
    memory: Memory = getattr(cache, ATTRIBUTE)
    whole, length = _logical_length(cache), int(length)  # some hosts count on the device
    left = max(0, whole + length if length <= 0 else length)
    surplus = memory.length - left
    if surplus > 0:
        for held in memory.layers:
            last = held.column[:, -surplus:]
            if last.shape[1] < surplus or bool((last != torch.arange(left, memory.length, device=last.device)).any()):
                raise StateError(
                    f"the KV cache cannot be cropped to {left} tokens: visual tokens behind that place were dropped, "
                    "and layers hold different ones of them. Prefill again, or crop only what follows the last image."
                )
        setattr(cache, ATTRIBUTE, memory.without_last(surplus))
    host.crop(cache, max(0, whole - left))


def _select(cache: Any, samples: Int[Tensor, " J"]) -> None:
    setattr(cache, ATTRIBUTE, getattr(cache, ATTRIBUTE).of(samples))


def _forget(cache: Any) -> None:
    """An emptied cache is a new one."""
    delattr(cache, ATTRIBUTE)
    host.forget(cache)
