"""What the last compressed prefill did, in every counting convention that papers mix."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc import flops
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout, Medium


@dataclass(frozen=True, eq=False)
class Report:
    """One prefill of a patched model.

    Args:
        spec: the methods, as a spec string.
        family: the adapter's family.
        visual_tokens: uncompressed visual tokens of each sample.
        entering: visual tokens of each sample that entered the LLM.
        per_layer: visual tokens of each sample at each decoder layer.
        kv_tokens: visual tokens of each sample in the KV cache of each decoder layer after the prefill.
        text_tokens: other columns of each sample (padding included).
        selection_ms: site -> milliseconds spent deciding and applying.
        flops_dense, flops: prefill FLOPs of the LLM, uncompressed and compressed, summed over the batch.
        kv_bytes_dense, kv_bytes: bytes of the KV cache after the prefill.
        kv_bytes_per_layer: the same, layer by layer.
        notes: what a reader should know (a budget above N, ...).
        token_map: uncompressed tokens -> tokens that are left at the end, one group per image or sample.
        samples: batch row of each group of `token_map`.
        layout: places of the uncompressed tokens of each image or video, in the order of the prompts.
        media: what each group of `layout` is. A group of `token_map` is one of them, or all of its sample in a row.
    """

    spec: str
    family: str
    visual_tokens: tuple[int, ...]
    entering: tuple[int, ...]
    per_layer: tuple[tuple[int, ...], ...]
    kv_tokens: tuple[tuple[int, ...], ...]
    text_tokens: tuple[int, ...]
    selection_ms: dict[str, float]
    flops_dense: int
    flops: int
    kv_bytes_dense: int
    kv_bytes: int
    kv_bytes_per_layer: tuple[int, ...]
    notes: tuple[str, ...]
    token_map: TokenMap
    samples: tuple[int, ...]
    layout: Layout
    media: tuple[Medium, ...]

    @property
    def after_last_cut(self) -> tuple[int, ...]:
        """Visual tokens of each sample in the last layer."""
        return self.per_layer[-1]

    @property
    def layer_average(self) -> tuple[float, ...]:
        """Visual tokens of each sample, averaged over the decoder layers."""
        return tuple(sum(column) / len(self.per_layer) for column in zip(*self.per_layer, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data (the map and the layout are left out)."""
        data = {k: v for k, v in vars(self).items() if k not in ("token_map", "layout", "samples", "media")}
        return {**data, "after_last_cut": self.after_last_cut, "layer_average": self.layer_average}

    def __str__(self) -> str:
        def span(values: tuple[float | int, ...]) -> str:
            low, high = min(values), max(values)
            return f"{low:g}" if low == high else f"{low:g}..{high:g}"

        share = self.flops / self.flops_dense
        lines = [
            f"{self.spec} on {self.family}",
            f"  visual tokens      {span(self.visual_tokens)}",
            f"  entering the LLM   {span(self.entering)}",
            f"  after the last cut {span(self.after_last_cut)}",
            f"  layer average      {span(tuple(round(v, 1) for v in self.layer_average))}",
            f"  LLM prefill FLOPs  {self.flops_dense / 1e9:.2f} G -> {self.flops / 1e9:.2f} G ({share:.1%})",
            f"  KV cache           {self.kv_bytes_dense / 2**20:.2f} MiB -> {self.kv_bytes / 2**20:.2f} MiB",
            *([f"  KV cache by layer  {_runs(self.kv_bytes_per_layer)} KiB"] if len(set(self.kv_tokens)) > 1 else []),
            *(f"  selection {site:<9} {ms:.2f} ms" for site, ms in self.selection_ms.items()),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _runs(values: Sequence[int]) -> str:
    """Bytes of consecutive layers in KiB: "586.0 x 2, 74.0 x 6".

    Example:
        >>> _runs([2048, 2048, 1024])
        '2.0 x 2, 1.0 x 1'
    """
    return ", ".join(f"{value / 1024:.1f} x {len(list(run))}" for value, run in itertools.groupby(values))


def lengths_by_layer(cuts: dict[int, list[int]], layers: int) -> tuple[tuple[int, ...], ...]:
    """Visual tokens per sample at every layer, from the layers at which the number changed."""
    current: list[int] = cuts[0]
    rows = []
    for index in range(layers):
        current = cuts.get(index, current)
        rows.append(tuple(current))
    return tuple(rows)


def prefill_flops(
    config: Any,
    per_layer: tuple[tuple[int, ...], ...],
    text: tuple[int, ...],
    awake: Mapping[int, Sequence[int]] | None = None,
    attending: tuple[tuple[int, ...], ...] | None = None,
) -> int:
    """FLOPs of the prefill, summed over the samples.

    `awake` are the visual tokens that ask in frozen layers, `attending` those that attention repeats merged ones to.
    """
    total = 0
    for b, other in enumerate(text):
        lengths = [layer[b] + other for layer in per_layer]
        asking = [(awake or {}).get(index, layer)[b] + other for index, layer in enumerate(per_layer)]
        repeated = None if attending is None else [layer[b] + other for layer in attending]
        total += flops.llm_prefill(config, lengths, awake=asking, attending=repeated)
    return total


def cache_bytes(
    config: Any, kv_tokens: tuple[tuple[int, ...], ...], text: tuple[int, ...], element_size: int
) -> tuple[int, ...]:
    """Bytes of the KV cache of each layer, summed over the samples."""
    return tuple(
        sum(flops.kv_bytes(config, [n + other], element_size) for n, other in zip(layer, text, strict=True))
        for layer in kv_tokens
    )
