"""What a KV cache of transformers is: layers with keys and values [B, G, K, d], and lengths that hosts ask it for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vtc.indices import take

#: what hosts ask a cache, with the arguments that our answers take
ASKED = {
    "get_seq_length": ("layer_idx",),
    "get_query_offset": ("layer_idx",),
    "get_mask_sizes": ("query_length", "layer_idx"),
}

#: methods by which a host leaves a cache some of its samples, in some order
SELECTING = ("reorder_cache", "batch_select_indices")

#: methods that vtc answers for
ANSWERED = (*ASKED, "crop", *SELECTING, "reset")

#: members of the cache that vtc reads, calls or answers for
MEMBERS = ("layers", "update", "is_compileable", *ANSWERED)

#: members of one of its layers
LAYER_MEMBERS = ("keys", "values", "update", "get_seq_length")


def layer_count(cache: Any) -> int:
    """Layers that hold something, or will."""
    return len(cache.layers)


def held_length(cache: Any, layer: int = 0) -> int:
    """Entries that a layer really holds."""
    return int(cache.layers[layer].get_seq_length()) if layer < len(cache.layers) else 0


def keys(cache: Any, layer: int) -> Tensor:
    """Rotated keys [B, G, K, d] that a layer holds."""
    held: Tensor = cache.layers[layer].keys
    return held


def is_static(cache: Any) -> bool:
    """Whether entries have fixed places, so that none can be dropped."""
    return bool(getattr(cache, "is_compileable", False)) and layer_count(cache) > 0


def is_whole(cache: Any) -> bool:
    """Whether every layer holds as many entries as the first: nothing was dropped inside the LLM.

    Layers that hold nothing yet are passed over, and so are those that are meant to forget (sliding windows).
    """
    held = [layer.keys.shape[-2] for layer in cache.layers if _is_plain(layer)]
    return len(set(held)) < 2


def _is_plain(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.dim() == 4 and not getattr(layer, "is_sliding", False)


def select(cache: Any, layer: int, index: Int[Tensor, "B R"]) -> None:
    """Leave a layer the entries `index`, in this order; -1 reads entry 0, which masks hide."""
    entries = cache.layers[layer]
    entries.keys, entries.values = (take(part, index, 2) for part in (entries.keys, entries.values))


def crop(cache: Any, count: int) -> None:
    """Take the last `count` entries off every layer."""
    type(cache).crop(cache, -count)


def answer(
    cache: Any,
    length: Callable[..., int],
    offset: Callable[..., int],
    mask_sizes: Callable[..., tuple[int, int]],
    crop: Callable[..., None],
    select: Callable[[Any, Tensor], None],
    reset: Callable[[Any], None],
) -> None:
    """Let `cache` answer its host by these functions, which get the cache first.

    They are attributes of the instance, not of a class: they go with the cache, survive copies, and nothing global
    changes.

    Args:
        cache: the cache.
        length: (cache, layer_idx=0) -> tokens that the host should think it holds.
        offset: (cache, layer_idx=0) -> place of the next query among the keys.
        mask_sizes: (cache, query_length, layer_idx=0) -> width of a mask, and of which key its first column is.
        crop: (cache, n) -> None, by the tokens that the host thinks it holds.
        select: (cache, samples [J]) -> None, called when the host leaves the cache these samples, in this order.
        reset: (cache) -> None, called before the host empties the cache.
    """
    cache.get_seq_length = functools.partial(length, cache)
    cache.get_query_offset = functools.partial(offset, cache)
    cache.get_mask_sizes = functools.partial(mask_sizes, cache)
    cache.crop = functools.partial(crop, cache)
    for name in SELECTING:
        setattr(cache, name, functools.partial(_select_samples, cache, name, select))
    cache.reset = functools.partial(_reset, cache, reset)


def forget(cache: Any) -> None:
    """Let `cache` answer by its class again."""
    for name in ANSWERED:
        vars(cache).pop(name, None)


def _select_samples(cache: Any, name: str, select: Callable[[Any, Tensor], None], samples: Tensor) -> None:
    select(cache, samples)
    getattr(type(cache), name)(cache, samples)


def _reset(cache: Any, reset: Callable[[Any], None]) -> None:
    reset(cache)
    type(cache).reset(cache)


class Prepended:
    """Stands in for a cache in one call of a layer: puts entries of ours before those that the layer adds.

    Args:
        cache: the cache; None: the layer runs without one.
        keys: [B, G, F, d].
        values: [B, G, F, d].
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self._cache, self._keys, self._values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        if self._cache is None:
            return keys, values
        held: tuple[Tensor, Tensor] = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        return held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
