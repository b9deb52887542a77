"""Queries, keys and attention of one decoder layer, as signals read them.

A layer that has run gave its queries and keys before RoPE, which are rotated here; for the layer at the site itself
they are projected from the states that enter it. Only the rows that are asked for are computed, under the mask that the
layer itself gets.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vtc.adapter import Adapter
from vtc.engine.host import cache as host
from vtc.engine.host import names
from vtc.engine.host.rotary import rotate
from vtc.engine.llm import sizes
from vtc.engine.llm.forward import Forward
from vtc.engine.llm.rows import Rows
from vtc.indices import take
from vtc.kernels import attention_rows

#: what a layer at the site would get, cut to the rows that enter it
Arguments = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Source:
    """Queries and keys of one layer for the rows that it sees.

    Args:
        layer: which one.
        rows: those that it sees, in the order of its keys.
        hidden: what enters it, where it has not run yet; None: it has, and was captured.
        own: its arguments, where it has not run yet.
    """

    adapter: Adapter
    state: Forward
    layer: int
    rows: Rows
    hidden: Tensor | None = None
    own: Arguments | None = None

    @property
    def scale(self) -> float:
        return self.adapter.layer_attention(self.layer).scale

    @functools.cached_property
    def arguments(self) -> Mapping[str, Any]:
        """What the layer gets beside the states."""
        return self.own() if self.own is not None else self.state.arguments[self.layer]

    def plain_queries(self, rows: Int[Tensor, "B Q"] | None = None) -> Float[Tensor, "B H Q d"]:
        """Queries of `rows` (None: all) before RoPE."""
        if self.hidden is not None:
            return self.adapter.queries(self.layer, self.hidden if rows is None else take(self.hidden, rows))
        split = self.adapter.layer_attention(self.layer).split_queries
        return rows_of(split(self.state.captured[self.layer, "query"]), rows)

    def queries(self, rows: Int[Tensor, "B Q"] | None = None) -> Float[Tensor, "B H Q d"]:
        """Queries of `rows` (None: all) after RoPE."""
        cos, sin = self.arguments[names.POSITION_EMBEDDINGS]
        if rows is not None:
            cos, sin = take(cos, rows), take(sin, rows)
        return rotate(self.plain_queries(rows), cos, sin)

    @functools.cached_property
    def plain_keys(self) -> Float[Tensor, "B G R d"]:
        """Keys of all rows of this call before RoPE."""
        if self.hidden is not None:
            return self.adapter.keys_values(self.layer, self.hidden)[0]
        return self.adapter.layer_attention(self.layer).split_keys(self.state.captured[self.layer, "key"])

    @functools.cached_property
    def keys(self) -> Float[Tensor, "B G R d"]:
        """Keys of all rows of this call after RoPE."""
        cos, sin = self.arguments[names.POSITION_EMBEDDINGS]
        return rotate(self.plain_keys, cos, sin)

    @functools.cached_property
    def all_keys(self) -> Float[Tensor, "B G K d"]:
        """The same behind the keys of earlier calls."""
        prompt = self.rows.prompt
        if not prompt.held:
            return self.keys
        cached: Tensor = host.keys(prompt.cache, self.layer)
        return cached if self.hidden is None else torch.cat([cached, self.keys.to(cached.dtype)], dim=2)

    @functools.cached_property
    def valid(self) -> Bool[Tensor, "B R"]:
        """Which rows of this call are neither padding nor candidates of assisted decoding."""
        return self.rows.readable

    def visible(self, rows: Int[Tensor, "B Q"]) -> Bool[Tensor, "B Q K"]:
        """What `rows` see of all keys, by the mask that the layer gets."""
        mask = self.arguments.get(names.ATTENTION_MASK)
        keys, new = self.all_keys.shape[2], self.keys.shape[2]
        if mask is not None and mask.dim() == 4:
            return sizes.readable(take(mask[:, 0], rows))
        order = torch.arange(keys, device=rows.device)
        seen = order <= rows.clamp(min=0)[..., None] + keys - new
        return seen if mask is None else seen & mask.bool()[:, None]

    def biased(self, queries: Float[Tensor, "B H Q d"], keys: Float[Tensor, "B G K d"]) -> tuple[Tensor, Tensor]:
        """Queries and keys of all samples, whose products hold what the layer adds to the logits of each key."""
        bias = sizes.of_layer(self.state.plan, self.layer, self.rows)
        return sizes.in_products(queries, keys, bias, self.scale)

    def attention(self, rows: Int[Tensor, "B Q"], reduce_heads: bool = True) -> Tensor:
        """Probability that each of `rows` gives the rows of this call, [B, Q, R] (mean) or [B, H, Q, R]."""
        queries, keys = self.biased(self.queries(rows), self.all_keys)
        given = attention_rows(queries, keys, mask=self.visible(rows), scale=self.scale, reduce_heads=reduce_heads)
        return given[..., -self.keys.shape[2] :]

    def gravity(self, rows: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q R"]:
        """Mean product of vectors of ones, rotated to the places of `rows` and of all rows of this call."""
        cos, sin = (part.float() for part in self.arguments[names.POSITION_EMBEDDINGS])
        here = take(cos, rows), take(sin, rows)
        asking = rotate(torch.ones_like(here[0])[:, None], *here)
        keys = rotate(torch.ones_like(cos)[:, None], cos, sin).expand(asking.shape[0], -1, -1, -1)
        return attention_rows(asking, keys, scale=1.0 / keys.shape[-1], softmax=False)


def rows_of(heads: Float[Tensor, "B H R d"], rows: Int[Tensor, "B Q"] | None) -> Float[Tensor, "B H Q d"]:
    if rows is None:
        return heads
    return take(heads, rows, 2)
