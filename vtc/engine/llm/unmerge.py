"""Virtual token unmerging (DyMU, arXiv 2504.17040): attention as if every merged token stood at all its places.

Between the decoder layers, in their norms, projections and MLPs, each merged token is one row. Inside the attention its
query, key and value are repeated for every token it stands for, rotated at that token's own position, and the outputs
are averaged again. So nothing is dropped: masks, positions and the KV cache are those of the uncompressed prompt, and
the decoder computes exactly what it would on the full sequence made of merged tokens, if the states of a merged token
stayed equal at all its places; averaging them after every attention is what keeps them so.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.llm.forward import FORWARD, Forward
from vtc.engine.llm.visual import Visual
from vtc.errors import UnsupportedFeatureError
from vtc.indices import compact, follow, invert, take


@dataclass(frozen=True, eq=False)
class Unmerging:
    """Which row each column of the prompt reads.

    Args:
        column: int64 [B, R] column of each row: text, and the anchors of merged tokens; -1 is padding.
        row: int64 [B, S] row of each column; -1 for the prompt's padding.
    """

    column: Int[Tensor, "B R"]
    row: Int[Tensor, "B S"]

    def expand(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, S, D]."""
        return take(x, self.row)

    def first(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, R, D], each row from its own column."""
        return take(x, self.column)

    def mean(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, R, D], each row the mean over its columns."""
        rows = self.column.shape[1]
        target = torch.where(self.row < 0, rows, self.row)  # the prompt's padding lands in an extra row
        count = x.new_zeros(x.shape[0], rows + 1).scatter_add(1, target, x.new_ones(target.shape))
        total = x.new_zeros(x.shape[0], rows + 1, x.shape[2]).scatter_add(1, target[..., None].expand_as(x), x)
        return (total / count.clamp(min=1)[..., None])[:, :rows]


def attach(adapter: Adapter, undo: Undo) -> None:
    """Hook every decoder layer; what takes the hooks off again goes to `undo`."""
    undo.before(adapter.layers[0], _shorten, with_kwargs=True)
    for index in range(len(adapter.layers)):
        attention, inputs, output = adapter.projections(index)
        undo.before(attention, _expand_input, with_kwargs=True)
        undo.after(attention, _shorten_output)
        # each projection runs on the rows alone, though the attention around it sees every column
        for module, cut in (*((part, "first") for part in inputs), (output, "mean")):
            undo.before(module, functools.partial(_before_projection, cut))
            undo.after(module, _after_projection)


def begin(state: Forward, located: Visual, embeds: Tensor) -> Tensor:
    """Decide which row each column reads, and write each merged feature to all its places.

    Raises:
        UnsupportedFeatureError: a token was dropped rather than merged, so it has no row to read.
    """
    visual, prompt = state.visual, state.prompt
    assert visual is not None and prompt is not None and prompt.is_visual is not None
    whole = located if len(located.sample) == len(visual.sample) else located.pooled()
    slot = visual.token_map.sources()[:, : whole.column.shape[1]]
    real = whole.column >= 0
    # a separator of the host (newline) that no stage sees has no token to be merged into: it stays what it is
    alone = (slot < 0) & (whole.layout.row < 0)
    if bool(((slot < 0) & real & ~alone).any()):
        raise UnsupportedFeatureError(
            "virtual unmerging needs a method that merges every token into one that stays, and this one dropped some. "
            "Use unmerge=False, or a merging method such as tome or dymu."
        )
    anchor = torch.where(alone, whole.column, take(visual.column, slot))
    reads = prompt.arange(prompt.length).clone()
    reads = torch.cat([reads, reads[:, :1]], dim=1)  # an extra column takes what is padding
    target = torch.where(real, whole.column, prompt.length)
    reads = reads.index_put((whole.sample_index[:, None], target), anchor)[:, : prompt.length]
    keep = reads == prompt.arange(prompt.length)
    if prompt.valid is not None:
        keep = keep & prompt.valid
    counts, state.visual_lengths[0] = torch.stack([keep.sum(1), (keep & prompt.is_visual).sum(1)]).tolist()
    column = compact(keep, counts)
    row = follow(invert(column, prompt.length), reads)
    if prompt.valid is not None:
        row = row.masked_fill(~prompt.valid, -1)
    state.unmerging = Unmerging(column, row)
    return take(embeds, reads)


def restore(output: Any) -> Any:
    """What the language model returns, with a hidden state for every column again."""
    state = FORWARD.get()
    assert state is not None and state.unmerging is not None
    return names.with_last_hidden(output, state.unmerging.expand(output[0]))


def _running() -> Unmerging | None:
    state = FORWARD.get()
    return None if state is None else state.unmerging


def _shorten(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the first decoder layer."""
    running = _running()
    return None if running is None else ((running.first(args[0]), *args[1:]), kwargs)


def _expand_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of an attention: it sees every column."""
    running = _running()
    if running is None:
        return None
    return names.with_hidden_argument(args, kwargs, running.expand(names.hidden_argument(args, kwargs)))


def _shorten_output(module: nn.Module, args: Any, output: Any) -> Any:
    running = _running()
    if running is None:
        return None
    return names.with_first(output, running.first(names.first_of(output)))


def _before_projection(cut: str, module: nn.Module, args: Any) -> Any:
    running = _running()
    return None if running is None else (getattr(running, cut)(args[0]), *args[1:])


def _after_projection(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    running = _running()
    return None if running is None else running.expand(output)
