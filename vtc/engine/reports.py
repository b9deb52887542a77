"""What a call did, as a report: noted when the call ends, counted when somebody asks."""

from collections.abc import Callable, Iterable
from typing import Any

from vtc.adapter import Adapter
from vtc.encoder_report import EncoderReport
from vtc.encoders import ImageEncoder
from vtc.engine.llm.evict import held_after_prefill
from vtc.engine.llm.forward import Forward
from vtc.engine.plan import Plan
from vtc.engine.vision.passage import Passage
from vtc.engine.vision.tower import without_prefix
from vtc.flops import vit_block
from vtc.report import Report, cache_bytes, lengths_by_layer, prefill_flops
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout


def of_forward(adapter: Adapter, spec: str, state: Forward) -> Callable[[], Report]:
    """The report of a prefill with images."""
    plan = state.plan
    visual, prompt = state.visual, state.prompt
    assert visual is not None and prompt is not None and prompt.layout is not None
    layout, media, batch, length = prompt.layout, prompt.media, prompt.batch, prompt.length
    cuts, seconds = dict(state.visual_lengths), list(state.seconds)
    awake = dict(state.awake)

    def report() -> Report:
        config = adapter.text_config
        dense = visual.per_sample(batch, [sum(images) for images in visual.origin])
        per_layer = lengths_by_layer(cuts, len(adapter.layers))
        text = tuple(length - n for n in dense)
        size = next(adapter.language_model.parameters()).element_size()
        everything = (tuple(dense),) * len(per_layer)
        virtual = plan.unmerge  # attention and caches see every token at its place
        kv_tokens = everything if virtual else held_after_prefill(plan, per_layer)
        kept = cache_bytes(config, kv_tokens, text, size)
        return Report(
            spec=spec,
            family=adapter.family,
            visual_tokens=tuple(dense),
            entering=per_layer[0],
            per_layer=per_layer,
            text_tokens=text,
            selection_ms=_milliseconds(seconds),
            kv_tokens=kv_tokens,
            flops_dense=prefill_flops(config, everything, text),
            flops=prefill_flops(config, per_layer, text, awake, everything if virtual else None),
            kv_bytes_dense=sum(cache_bytes(config, everything, text, size)),
            kv_bytes=sum(kept),
            kv_bytes_per_layer=kept,
            notes=_notes(plan, visual.origin),
            token_map=visual.token_map,
            samples=visual.sample,
            layout=layout,
            media=media,
        )

    return report


def of_passage(
    encoder: ImageEncoder, spec: str, passage: Passage, layout: Layout | None
) -> Callable[[], EncoderReport]:
    """The report of a batch of images through an encoder by itself."""
    images, patches, prefix = len(passage.rows), passage.patches, passage.prefix
    left, seconds, token_map = dict(passage.left), list(passage.seconds), passage.token_map

    def report() -> EncoderReport:
        per_block, current = [], (patches,) * images
        for index in range(len(encoder.blocks)):
            current = left.get(index, current)
            per_block.append(current)
        stock = [(prefix + patches,) * images] * len(encoder.blocks)
        counted = [tuple(prefix + n for n in lengths) for lengths in per_block]
        identity = TokenMap.identity((patches,) * images, passage.device)
        return EncoderReport(
            spec=spec,
            encoder=encoder.name,
            patches=(patches,) * images,
            prefix=prefix,
            per_block=tuple(per_block),
            selection_ms=_milliseconds(seconds),
            flops_dense=_flops(encoder, stock, stock[0]),
            flops=_flops(encoder, counted, stock[0]),
            token_map=identity if token_map is None else without_prefix(token_map, prefix).raster(),
            layout=layout,
        )

    return report


def _milliseconds(watches: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """What was spent at each site."""
    spent: dict[str, float] = {}
    for site, watch in watches:
        spent[site] = spent.get(site, 0.0) + watch.seconds * 1e3
    return spent


def _notes(plan: Plan, origin: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    notes = []
    for step in plan.steps:
        longest = max(n for images in origin for n in images)
        if step.budget.tokens is not None and step.budget.per == "image" and step.budget.tokens >= longest:
            notes.append(f"{step}: budget {step.budget.tokens} covers all {longest} tokens, everything is kept")
    return tuple(notes)


def _flops(encoder: ImageEncoder, lengths: list[tuple[int, ...]], entering: tuple[int, ...]) -> int:
    """FLOPs of the blocks, summed over the images, where block i leaves `lengths[i]` tokens of each."""
    total = 0
    for block, leaving in zip(encoder.blocks, lengths, strict=True):
        halves, attention = encoder.halves(block), encoder.attention_of(block)
        weights = [sum(p.numel() for p in half.parameters() if p.dim() == 2) for half in (halves.attention, halves.mlp)]
        width = attention.num_heads * attention.head_dim
        total += sum(vit_block(n, m, weights[0], weights[1], width) for n, m in zip(entering, leaving, strict=True))
        entering = leaving
    return total
