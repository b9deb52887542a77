"""Signals of one tower block, for the stages that act inside it."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vtc.adapter import Attention
from vtc.engine.readers import Readers
from vtc.kernels import attention_rows, received_attention


@dataclass(frozen=True, eq=False)
class Block:
    """A block whose attention has run, and the rows that the stages see of it.

    Args:
        attention: the parts of its attention.
        captured: what its projections "query" and "key" gave.
        rows: the tile of each group.
        width: rows of a group, prefix included.
        ends: rows of each tile that are tokens.
        bias: what the block added to the logits of each key, [T, 1, 1, R]; None: nothing.
        sizes: asked now, how many input tokens each row stands for, [G, N].
    """

    attention: Attention
    captured: Mapping[str, Tensor]
    rows: list[int]
    width: int
    ends: list[int]
    bias: Tensor | None
    sizes: Callable[[], Tensor]

    @functools.cached_property
    def keys(self) -> Float[Tensor, "T H R d"]:
        return self.attention.split_keys(self.captured["key"])

    @functools.cached_property
    def queries(self) -> Float[Tensor, "T H R d"]:
        """Logits are q.k / sqrt(d) for whoever reads them, whatever factor this tower has."""
        attention = self.attention
        queries = attention.split_queries(self.captured["query"])
        if math.isclose(attention.scale, attention.head_dim**-0.5):
            return queries
        return queries * (attention.scale * attention.head_dim**0.5)

    @functools.cached_property
    def attended(self) -> tuple[Float[Tensor, "T H R e"], Float[Tensor, "T H R e"], Bool[Tensor, "T R"]]:
        """Queries and keys whose products hold the bias of the block, and which rows are tokens."""
        queries, keys = self.queries, self.keys
        ends = torch.tensor(self.ends, device=keys.device)
        seen = torch.arange(keys.shape[2], device=keys.device) < ends[:, None]
        if self.bias is None:
            return queries, keys, seen
        # one more dimension: 1 in the query times bias * sqrt(d) in the key
        bias = self.bias[:, :, 0].masked_fill(~seen[:, None], 0) * queries.shape[-1] ** 0.5
        bias = bias.expand(-1, keys.shape[1], -1)[..., None].to(keys.dtype)
        return torch.cat([queries, torch.ones_like(queries[..., :1])], -1), torch.cat([keys, bias], -1), seen


#: signals [G, N, ...] or [G, H, N, d] of the rows that the stages see, prefix included
READERS: Readers[Callable[[Block], Tensor]] = Readers()
reads = READERS.reads


@reads("keys")
def _keys(block: Block) -> Tensor:
    return block.keys[block.rows, :, : block.width]


@reads("queries")
def _queries(block: Block) -> Tensor:
    return block.queries[block.rows, :, : block.width]


@reads("cls_attention")
def _cls_attention(block: Block) -> Tensor:
    queries, keys, seen = block.attended
    row = attention_rows(queries[:, :, :1], keys, mask=seen, scale=block.attention.head_dim**-0.5)
    return row[block.rows, 0, : block.width]


@reads("received_attention")
def _received_attention(block: Block) -> Tensor:
    queries, keys, seen = block.attended
    segments = torch.where(seen, 0, -1)
    received = received_attention(queries, keys, segments=segments, scale=block.attention.head_dim**-0.5)
    return received[block.rows, : block.width]


@reads("sizes")
def _sizes(block: Block) -> Tensor:
    return block.sizes()
