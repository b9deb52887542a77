"""Signals of stages at `llm_in` and `layer[k]`: one function reads each.

Those that a decoder layer makes come from a layer of the same forward (`vtc.engine.llm.source`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.llm import carried
from vtc.engine.llm.forward import Forward, compressed_forward
from vtc.engine.llm.rows import Rows
from vtc.engine.llm.source import Arguments, Source, rows_of
from vtc.engine.llm.visual import Visual
from vtc.engine.plan import Plan, Step, source_layer
from vtc.engine.readers import Readers
from vtc.errors import UnsupportedFeatureError
from vtc.indices import follow, shift, take
from vtc.kernels import attention_rows, received_attention
from vtc.signals import SIGNALS, read_at
from vtc.stages import Signal


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Hook the modules whose outputs the signals of `plan` are made of; what takes the hooks off goes to `undo`."""
    needs: dict[int, set[str]] = {}
    for index in plan.layers:
        for signal in plan.signals("layer", index):
            source = source_layer(index, signal)
            if source is not None and source < index:
                needs.setdefault(source, set()).update(SIGNALS[signal.name].of)
    for source, needed in sorted(needs.items()):
        attention, layer = adapter.layer_attention(source), adapter.layers[source]
        if "query" in needed:
            undo.after(attention.query, functools.partial(_capture, source, "query"))
        if "key" in needed:
            undo.after(attention.key, functools.partial(_capture, source, "key"))
        if needed & {"rotation", "logits"}:
            undo.before(layer, functools.partial(_capture_arguments, source), with_kwargs=True)
        if "attention_output" in needed:
            assert attention.output is not None
            hook = functools.partial(_capture, source, "attention_output")
            undo.after(attention.output, hook)
        if "layer_input" in needed:
            enter = functools.partial(_capture_input, source, "layer_input")
            undo.before(layer, enter)
        if "mlp_input" in needed:
            enter = functools.partial(_capture_input, source, "mlp_input")
            undo.before(adapter.layer_mlp(source), enter)


def note_door(plan: Plan, state: Forward, visual: Visual, embeds: Tensor) -> None:
    """Keep what enters the LLM, where a stage in its layers reads that."""
    wanted = {signal.name for index in plan.layers for signal in plan.signals("layer", index)}
    if any("embeds" in SIGNALS[name].of for name in wanted):
        state.embeds, state.embedded = embeds, visual.pooled()


@dataclass(frozen=True, eq=False)
class Moment:
    """The point of a forward at which a stage acts.

    Args:
        adapter: of the model.
        state: the forward.
        rows: those of the hidden states now.
        visual: the tokens of the stage.
        embeds: [B, S, D] what entered the LLM, a row for each column; None where no stage reads that.
        hidden: what enters the decoder layer at the site; None at the door.
        index: of that layer.
        own: the arguments that it would get.
    """

    adapter: Adapter
    state: Forward
    rows: Rows
    visual: Visual
    embeds: Tensor | None
    hidden: Tensor | None = None
    index: int | None = None
    own: Arguments | None = None

    @functools.cached_property
    def text(self) -> Int[Tensor, "B T"]:
        """Rows of the text tokens, in order; the width holds the longest text, without asking the device."""
        prompt, visual = self.rows.prompt, self.visual
        width = prompt.length - min(visual.per_sample(prompt.batch, [sum(images) for images in visual.origin]))
        return (~self._is_text).long().argsort(dim=1, stable=True)[:, :width]

    @functools.cached_property
    def text_mask(self) -> Bool[Tensor, "B T"]:
        """Which of them are text tokens."""
        return self._is_text.gather(1, self.text)

    @functools.cached_property
    def text_column(self) -> Int[Tensor, "B T"]:
        """Their columns."""
        return follow(self.rows.columns, self.text)

    @functools.cached_property
    def _is_text(self) -> Bool[Tensor, "B R"]:
        is_visual = self.rows.prompt.is_visual
        assert is_visual is not None
        return self.rows.readable & ~take(is_visual, self.rows.columns)


@dataclass(frozen=True, eq=False)
class Reading:
    """One signal at one moment, and where the tokens of the stage and the text stand in the layer that makes it."""

    moment: Moment
    signal: Signal

    @functools.cached_property
    def source(self) -> Source:
        """The layer that makes the signal."""
        moment, state = self.moment, self.moment.state
        assert moment.index is not None
        layer = source_layer(moment.index, self.signal)
        assert layer is not None
        if layer == moment.index:  # it has not run
            return Source(moment.adapter, state, layer, moment.rows, moment.hidden, moment.own)
        seen = state.seen.get(layer, state.door)
        assert seen is not None
        return Source(moment.adapter, state, layer, seen)

    @property
    def sample(self) -> Int[Tensor, " G"]:
        """The sample of each group of tokens."""
        return self.moment.visual.sample_index

    @functools.cached_property
    def rows(self) -> Int[Tensor, "G N"]:
        """Rows of the visual tokens, -1 where the layer did not see one."""
        return self.moment.visual.rows(self.source.rows.row_of)

    @functools.cached_property
    def text(self) -> Int[Tensor, "B T"]:
        """Rows of the text tokens."""
        return follow(self.source.rows.row_of, self.moment.text_column)

    @functools.cached_property
    def last_visual(self) -> Int[Tensor, "B 1"]:
        """The row of the last visual token of each sample, -1 where there is none."""
        last = self.rows.amax(dim=1)
        batch = self.source.valid.shape[0]
        return last.new_full((batch,), -1).scatter_reduce(0, self.sample, last, "amax")[:, None]

    @property
    def every_row(self) -> Int[Tensor, "B R"]:
        valid = self.source.valid
        return torch.arange(valid.shape[1], device=valid.device).expand(valid.shape[0], -1)

    def tokens(self, value: Tensor) -> Tensor:
        """`value` [B, ...] of all rows for the visual tokens; zeros where the layer did not see one."""
        value, index, dim = value[self.sample], self.rows, SIGNALS[self.signal.name].axis
        missing = (index < 0).view(len(index), *[1] * (dim - 1), -1, *[1] * (value.dim() - dim - 1))
        return take(value, index, dim).masked_fill(missing, 0)


#: signals of the tokens of a stage, one group after the other
READERS: Readers[Callable[[Reading], Tensor]] = Readers()
reads = READERS.reads


def collect(step: Step, moment: Moment) -> dict[str, Tensor]:
    """The signals that the stage of `step` declares, and what comes with them, aligned with its tokens."""
    found = carried.collect(step, moment.state, moment.visual)
    declared = {signal.name: signal for signal in step.stage.signals}
    for name in read_at(step.stage.site.name, tuple(declared)):
        if not SIGNALS[name].carried:
            found[name] = READERS[name](Reading(moment, declared.get(name, Signal(name))))
    return found


# What enters the site, and what entered the LLM


@reads("position")
def _position(read: Reading) -> Tensor:
    return shift(read.moment.visual.column, read.moment.rows.prompt.past)


@reads("normed_states")
def _normed_states(read: Reading) -> Tensor:
    moment = read.moment
    assert moment.hidden is not None
    return moment.adapter.final_norm(moment.visual.gather(moment.hidden, moment.rows.row_of))


@reads("visual_embeds")
def _visual_embeds(read: Reading) -> Tensor:
    visual, embeds = read.moment.state.embedded, read.moment.embeds
    assert visual is not None and embeds is not None
    return visual.gather(embeds)[_pooled_group(read, visual)]


@reads("visual_mask")
def _visual_mask(read: Reading) -> Tensor:
    visual = read.moment.state.embedded
    assert visual is not None
    return (visual.column >= 0)[_pooled_group(read, visual)]


@reads("text_states")
def _text_states(read: Reading) -> Tensor:
    moment = read.moment
    assert moment.hidden is not None
    return moment.adapter.final_norm(take(moment.hidden, moment.text))[read.sample]


@reads("text_embeds")
def _text_embeds(read: Reading) -> Tensor:
    assert read.moment.embeds is not None
    return take(read.moment.embeds, read.moment.text_column)[read.sample]


@reads("text_mask")
def _text_mask(read: Reading) -> Tensor:
    return read.moment.text_mask[read.sample]


@reads("text_position")
def _text_position(read: Reading) -> Tensor:
    return read.moment.text_column[read.sample] + read.moment.rows.prompt.past


@reads("text_after")
def _text_after(read: Reading) -> Tensor:
    rows = read.moment.visual.rows(read.moment.rows.row_of)
    return read.moment.text[read.sample] > rows.max(dim=1, keepdim=True).values


# What a layer gave on its way


@reads("attention_output", "layer_input", "mlp_input")
def _captured(read: Reading) -> Tensor:
    return read.tokens(read.moment.state.captured[read.source.layer, read.signal.name])


# Queries and keys of a layer


@reads("keys", "layer_keys")
def _keys(read: Reading) -> Tensor:
    return read.tokens(read.source.keys)


@reads("queries")
def _queries(read: Reading) -> Tensor:
    return read.tokens(read.source.queries())


@reads("text_keys")
def _text_keys(read: Reading) -> Tensor:
    return rows_of(read.source.keys, read.text)[read.sample]


@reads("text_queries")
def _text_queries(read: Reading) -> Tensor:
    return read.source.queries(read.text)[read.sample]


@reads("sequence_keys")
def _sequence_keys(read: Reading) -> Tensor:
    return read.source.keys[read.sample]


@reads("sequence_queries")
def _sequence_queries(read: Reading) -> Tensor:
    return read.source.queries()[read.sample]


@reads("sequence_valid")
def _sequence_valid(read: Reading) -> Tensor:
    return read.source.valid[read.sample]


@reads("sequence_row")
def _sequence_row(read: Reading) -> Tensor:
    return read.rows


# Attention of a layer


@reads("text_attention")
def _text_attention(read: Reading) -> Tensor:
    return read.tokens(read.source.attention(read.text))


@reads("text_attention_heads")
def _text_attention_heads(read: Reading) -> Tensor:
    return read.tokens(read.source.attention(read.text, reduce_heads=False))


@reads("text_gravity")
def _text_gravity(read: Reading) -> Tensor:
    return read.tokens(read.source.gravity(read.text))


@reads("attention_to_text")
def _attention_to_text(read: Reading) -> Float[Tensor, "G N T"]:
    """For each sample the rows of all its visual tokens, computed once."""
    source, sample = read.source, read.sample
    every, keys = source.biased(source.queries(), source.all_keys)
    queries, keys = rows_of(every[sample], read.rows), keys[sample]
    visible = take(source.visible(read.every_row)[sample], read.rows)
    given = attention_rows(queries, keys, mask=visible, scale=source.scale)
    given = given[..., -source.keys.shape[2] :]
    seen = (read.rows >= 0)[..., None] & read.moment.text_mask[sample][:, None]
    return take(given, read.text[sample], 2) * seen


@reads("global_attention")
def _global_attention(read: Reading) -> Tensor:
    """Attention of the mean query of all rows up to the last visual one, among them and without RoPE."""
    source = read.source
    inside = source.valid & (read.every_row <= read.last_visual)
    weight = inside[:, None, :, None]
    mean = (source.plain_queries() * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)
    return read.tokens(attention_rows(mean, source.plain_keys, mask=inside, scale=source.scale)[:, 0])


@reads("query_attention")
def _query_attention(read: Reading) -> Tensor:
    source = read.source
    if read.signal.rows == "mean":
        _refuse_held(source)
        segments = torch.where(source.valid, 0, -1)
        queries, keys = source.biased(source.queries(), source.keys)
        return read.tokens(received_attention(queries, keys, segments=segments, causal=True, scale=source.scale))
    chosen, weight = _query_rows(read)
    return read.tokens(_weighted(source.attention(chosen), weight))


@reads("query_logits")
def _query_logits(read: Reading) -> Tensor:
    source = read.source
    if read.signal.rows == "mean":
        _refuse_held(source)
        count = source.valid.sum(dim=1).clamp(min=1)[:, None, None, None]
        mean = (source.queries() * source.valid[:, None, :, None]).sum(dim=2, keepdim=True) / count
        return read.tokens(attention_rows(mean, source.keys, scale=source.scale, softmax=False)[:, 0])
    chosen, weight = _query_rows(read)
    given = attention_rows(source.queries(chosen), source.keys, scale=source.scale, softmax=False)
    return read.tokens(_weighted(given, weight))


def _query_rows(read: Reading) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
    """The query rows that a signal asks for, "last" or "text", and which of them count."""
    valid = read.source.valid
    if read.signal.rows == "last":
        order = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        chosen = (valid * order).argmax(dim=1)[:, None]
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    is_text = read.moment.text_mask
    behind = is_text & (read.text > read.last_visual)
    return read.text, torch.where(behind.any(dim=1, keepdim=True), behind, is_text)


def _weighted(given: Float[Tensor, "B Q R"], weight: Bool[Tensor, "B Q"]) -> Float[Tensor, "B R"]:
    return (given * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def _refuse_held(source: Source) -> None:
    if source.rows.prompt.held:
        raise UnsupportedFeatureError(
            "query rows 'mean' need every query of the prompt, but part of it is in the cache. "
            "Use query='last', or start without a cache."
        )


def _pooled_group(read: Reading, visual: Visual) -> Int[Tensor, " G"]:
    """The group of `visual`, of which each sample has at most one, that has the sample of each token group."""
    where = torch.zeros(read.moment.rows.prompt.batch, dtype=torch.long, device=read.sample.device)
    where[visual.sample_index] = torch.arange(len(visual.sample), device=read.sample.device)
    return where[read.sample]


def _capture(layer: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
    state = compressed_forward()
    if state is not None:
        state.captured[layer, name] = names.first_of(output)


def _capture_input(layer: int, name: str, module: nn.Module, args: Any) -> None:
    _capture(layer, name, module, args, args[0])


def _capture_arguments(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    state = compressed_forward()
    if state is not None:
        state.arguments[layer] = kwargs
