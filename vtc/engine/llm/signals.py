"""Signals of `layer[k]` stages.

Attention signals come from one decoder layer of the same forward (`vtc.engine.llm.source`).
"""

import functools
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
from vtc.engine.plan import ATTENTION_SIGNALS, OUTPUTS, Plan, Step, source_layer
from vtc.errors import UnsupportedFeatureError
from vtc.indices import follow, take
from vtc.kernels import attention_rows, received_attention

DOOR = ("text_embeds", "visual_embeds")


def attach(adapter: Adapter, plan: Plan, undo: Undo) -> None:
    """Hook the modules whose outputs the signals of `plan` are made of; what takes the hooks off goes to `undo`."""
    needs: dict[int, set[str]] = {}
    for index in plan.layers:
        for signal in plan.signals("layer", index):
            source = source_layer(index, signal)
            if source is not None and source < index:
                needs.setdefault(source, set()).add(signal.name if signal.name in OUTPUTS else "attention")
    for source, needed in sorted(needs.items()):
        attention, layer = adapter.layer_attention(source), adapter.layers[source]
        if "attention" in needed:
            undo.after(attention.query, functools.partial(_capture, source, "query"))
            undo.after(attention.key, functools.partial(_capture, source, "key"))
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
    if any(signal.name in DOOR for index in plan.layers for signal in plan.signals("layer", index)):
        state.embeds, state.embedded = embeds, visual.pooled()


def collect(
    adapter: Adapter, step: Step, index: int, state: Forward, visual: Visual, hidden: Tensor, own: Arguments
) -> dict[str, Tensor]:
    """The signals that the stage of `step` at layer `index` declares, aligned with the tokens of `visual`."""
    found = carried.collect(step, state, visual)
    now = state.rows
    assert now is not None
    rows, sample = visual.rows(now.row_of), visual.sample_index
    needed = {signal.name for signal in step.stage.signals}
    if "position" in needed:
        found["position"] = torch.where(visual.column < 0, -1, visual.column + now.prompt.past)
    if "normed_states" in needed:
        found["normed_states"] = adapter.final_norm(visual.gather(hidden, now.row_of))
    text, is_text = _text_rows(now, visual)
    text_column = follow(now.columns, text)
    if any(name.startswith("text_") or name.endswith("_to_text") for name in needed):
        found["text_mask"] = is_text[sample]
        found["text_after"] = text[sample] > rows.max(dim=1, keepdim=True).values
        found["text_position"] = text_column[sample] + now.prompt.past
    if "text_states" in needed:
        found["text_states"] = adapter.final_norm(take(hidden, text))[sample]
    if "text_embeds" in needed:
        assert state.embeds is not None
        found["text_embeds"] = take(state.embeds, text_column)[sample]
    if "visual_embeds" in needed:
        found.update(_door_embeds(state, sample))
    for signal in step.stage.signals:
        layer = source_layer(index, signal)
        if layer is None:
            continue
        if layer < index:
            source = Source(adapter, state, layer, _seen(state, layer))
        else:
            source = Source(adapter, state, layer, now, hidden, own)
        places = Places(source, visual, sample, text_column, is_text)
        if signal.name in OUTPUTS:
            value = hidden if layer == index else state.captured[layer, signal.name]
            found[signal.name] = places.tokens(value[:, None], 2)[:, 0]
        else:
            found.update(places.read(signal.name, signal.rows))
    return found


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a stage and the text stand among the rows of a source."""

    source: Source
    visual: Visual
    sample: Tensor
    text_column: Int[Tensor, "B T"]
    is_text: Bool[Tensor, "B T"]

    @functools.cached_property
    def rows(self) -> Int[Tensor, "G N"]:
        """Rows of the visual tokens, -1 where the layer did not see one."""
        return self.visual.rows(self.source.rows.row_of)

    @functools.cached_property
    def text(self) -> Int[Tensor, "B T"]:
        return follow(self.source.rows.row_of, self.text_column)

    def tokens(self, value: Tensor, dim: int) -> Tensor:
        """`value` [B, ...] of all rows (along `dim`) for the visual tokens; zeros where the layer did not see one."""
        value, index = value[self.sample], self.rows
        missing = (index < 0).view(len(index), *[1] * (dim - 1), -1, *[1] * (value.dim() - dim - 1))
        return take(value, index, dim).masked_fill(missing, 0)

    def read(self, name: str, rows: str) -> dict[str, Tensor]:
        """The signal `name`, with what belongs to it."""
        source, sample = self.source, self.sample
        if name in ("query_attention", "query_logits"):
            return {name: self.tokens(self._query_rows(name, rows), 1)}
        if name == "text_attention":
            return {name: self.tokens(source.attention(self.text), 2)}
        if name == "text_attention_heads":
            return {name: self.tokens(source.attention(self.text, reduce_heads=False), 3)}
        if name == "text_gravity":
            return {name: self.tokens(source.gravity(self.text), 2)}
        if name == "attention_to_text":
            return {name: self._to_text()}
        if name == "global_attention":
            return {name: self.tokens(self._global(), 1)}
        if name in ("keys", "layer_keys"):
            return {name: self.tokens(source.keys, 2)}
        if name == "text_keys":
            return {name: rows_of(source.keys, self.text)[sample]}
        if name == "queries":
            return {name: self.tokens(source.queries(), 2)}
        if name == "text_queries":
            return {name: source.queries(self.text)[sample]}
        if name == "sequence_queries":
            return {name: source.queries()[sample]}
        if name == "sequence_keys":
            return {name: source.keys[sample]}
        if name == "sequence_valid":
            return {name: source.valid[sample]}
        assert name == "sequence_row" and name in ATTENTION_SIGNALS
        return {name: self.rows}

    def _query_rows(self, name: str, rows: str) -> Float[Tensor, "B R"]:
        """What the query rows give each row of this call, mean over heads (and rows)."""
        source = self.source
        if rows == "mean":
            if source.rows.prompt.held:
                raise UnsupportedFeatureError(
                    "query rows 'mean' need every query of the prompt, but part of it is in the cache. "
                    "Use query='last', or start without a cache."
                )
            if name == "query_logits":
                count = source.valid.sum(dim=1).clamp(min=1)[:, None, None, None]
                mean = (source.queries() * source.valid[:, None, :, None]).sum(dim=2, keepdim=True) / count
                return attention_rows(mean, source.keys, scale=source.scale, softmax=False)[:, 0]
            segments = torch.where(source.valid, 0, -1)
            queries, keys = source.biased(source.queries(), source.keys)
            return received_attention(queries, keys, segments=segments, causal=True, scale=source.scale)
        if rows == "last":
            order = torch.arange(1, source.valid.shape[1] + 1, device=source.valid.device)
            chosen = (source.valid * order).argmax(dim=1)[:, None]
            weight = torch.ones_like(chosen, dtype=torch.bool)
        else:
            last = self._last_visual()
            behind = self.is_text & (self.text > last)
            chosen = self.text
            weight = torch.where(behind.any(dim=1, keepdim=True), behind, self.is_text)
        if name == "query_logits":
            given = attention_rows(source.queries(chosen), source.keys, scale=source.scale, softmax=False)
        else:
            given = source.attention(chosen)
        return (given * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)

    def _to_text(self) -> Float[Tensor, "G N T"]:
        """What visual rows give text tokens; for each sample the rows of all its visual tokens, computed once."""
        source = self.source
        every, keys = source.biased(source.queries(), source.all_keys)
        queries, keys = rows_of(every[self.sample], self.rows), keys[self.sample]
        visible = source.visible(self._every_row())[self.sample]
        visible = take(visible, self.rows)
        given = attention_rows(queries, keys, mask=visible, scale=source.scale)
        given = given[..., -source.keys.shape[2] :]
        seen = (self.rows >= 0)[..., None] & self.is_text[self.sample][:, None]
        return take(given, self.text[self.sample], 2) * seen

    def _global(self) -> Float[Tensor, "B R"]:
        """Attention of the mean query of all rows up to the last visual one, among them and without RoPE."""
        source = self.source
        inside = source.valid & (self._every_row() <= self._last_visual())
        weight = inside[:, None, :, None]
        mean = (source.plain_queries() * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)
        return attention_rows(mean, source.plain_keys, mask=inside, scale=source.scale)[:, 0]

    def _last_visual(self) -> Int[Tensor, "B 1"]:
        """The row of the last visual token of each sample, -1 where there is none."""
        last = self.rows.amax(dim=1)
        batch = self.source.valid.shape[0]
        return last.new_full((batch,), -1).scatter_reduce(0, self.sample, last, "amax")[:, None]

    def _every_row(self) -> Int[Tensor, "B R"]:
        valid = self.source.valid
        return torch.arange(valid.shape[1], device=valid.device).expand(valid.shape[0], -1)


def _text_rows(rows: Rows, visual: Visual) -> tuple[Tensor, Tensor]:
    """Rows of the text tokens, in order, and which of them are valid; the width holds the longest text."""
    prompt = rows.prompt
    assert prompt.is_visual is not None
    is_text = rows.readable & ~take(prompt.is_visual, rows.columns)
    width = prompt.length - min(visual.per_sample(prompt.batch, [sum(images) for images in visual.origin]))
    order = (~is_text).long().argsort(dim=1, stable=True)[:, :width]
    return order, is_text.gather(1, order)


def _door_embeds(state: Forward, sample: Tensor) -> dict[str, Tensor]:
    """Embeddings of every visual token of the sample that entered the LLM."""
    visual, embeds = state.embedded, state.embeds
    assert visual is not None and embeds is not None
    where = torch.zeros(len(embeds), dtype=torch.long, device=sample.device)
    where[visual.sample_index] = torch.arange(len(visual.sample), device=sample.device)
    return {
        "visual_embeds": visual.gather(embeds)[where[sample]],
        "visual_mask": (visual.column >= 0)[where[sample]],
    }


def _seen(state: Forward, layer: int) -> Rows:
    """The rows that `layer`, which has run, saw."""
    rows = state.seen.get(layer, state.door)
    assert rows is not None
    return rows


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
