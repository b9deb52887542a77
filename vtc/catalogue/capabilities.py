"""What vtc can do on each model family, asked of the adapters and of the checks that a patch runs.

Nothing here is a list that somebody keeps: a site or signal is there if a stage that uses it passes `make_plan`.
The families stand for themselves as tiny models of `vtc.testing`, which is imported where they are built: the rest of
the library needs no model to work with.
"""

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from vtc.adapter import Adapter, adapter_classes, adapter_for
from vtc.catalogue.registry import declared, method_class
from vtc.companion import ClipCompanion, in_clip
from vtc.engine.planning import make_plan
from vtc.errors import VTCError
from vtc.settings import POSITIONS
from vtc.signals import signals_at
from vtc.stages import SITES, Method, Signal, Site, Stage, drop, nothing
from vtc.tokens import Budget

#: ways of generating that are tested against the masked full model on every family (tests/adapters)
GENERATION = (
    "greedy",
    "sampling",
    "beam search",
    "num_return_sequences",
    "streamer",
    "padded batches",
    "ragged keep counts",
    "several images in a prompt",
    "text-only prompts",
    "second turn with text",
    "second turn with new pixels",
    "prompt lookup",
    "assisted decoding",
)

#: what no family can do, and why
REFUSED = {
    "prefill_chunk_size": "pieces of a prompt no longer say what was decided about the whole",
    "static cache": "its entries have fixed places, so dropped tokens would still be attended to",
    "models compiled before the patch": "compiled code does not look at hooks that come later; compile afterwards",
    "gradient checkpointing in training": "layers run a second time without the state of the forward",
    "inputs_embeds without input_ids": "the places of visual tokens are read from the ids",
}


#: decoder layers of the models on which methods are tried: those of a 7B Llama, which published layer numbers assume
DEPTH = 32


@dataclass(frozen=True)
class _Probe(Method):
    """A method that does nothing but stand at a site and read one signal."""

    at_site: Site = field(default_factory=lambda: Site("llm_in"))
    reads: tuple[Signal, ...] = ()

    slug = "probe"

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.at_site, nothing, None, drop, self.reads),)


def capabilities() -> tuple[dict[str, Any], ...]:
    """One entry for every family, sorted by name; plain data. Models are built tiny, with random weights."""
    from vtc.testing.tiny import families, tiny

    known = families()
    return tuple(
        describe_adapter(adapter_for(tiny(cls.family).model)) if cls.family in known else _named(cls)
        for cls in adapter_classes()
    )


def describe(slug: str, families: bool = False) -> dict[str, Any]:
    """What a method declares, as plain data: the source of every table.

    Args:
        slug: a registered method.
        families: also try its default setting on every model family (`method_families`), which takes seconds the
            first time.

    Raises:
        SpecError: there is no such method.
    """
    return {**declared(slug), **(method_families(slug) if families else {})}


def method_families(slug: str) -> dict[str, Any]:
    """On which families the default setting of a method passes the checks of a patch; plain data.

    The models have `DEPTH` decoder layers and no weights, half of the tokens stay, and positions are "auto".
    `families_with_companion` run when CLIP is handed over (`vtc.ClipCompanion`), `families_refused` say why not.

    Raises:
        SpecError: there is no such method.
    """
    method = method_class(slug)(budget=Budget(ratio=0.5))
    found: dict[str, Any] = {"families": [], "families_with_companion": [], "families_refused": {}}
    for family, (adapter, companion) in _without_weights().items():
        reason = _refusal(adapter, (method,), "auto")
        if reason is None:
            found["families"].append(family)
        elif companion is not None and _refusal(adapter, (method,), "auto", companion) is None:
            found["families_with_companion"].append(family)
        else:
            found["families_refused"][family] = reason
    return found


@functools.cache
def _without_weights() -> dict[str, tuple[Adapter, ClipCompanion | None]]:
    """A model of every family on the meta device, with the CLIP model that its tower may have come from."""
    from vtc.testing.tiny import families, tiny

    with torch.device("meta"):
        adapters = {family: adapter_for(tiny(family, layers=DEPTH).model) for family in families()}
        return {family: (adapter, _companion(adapter)) for family, adapter in adapters.items()}


def _companion(adapter: Adapter) -> ClipCompanion | None:
    from transformers import CLIPConfig, CLIPModel

    towers: list[Any] = [encoder.tower for encoder in adapter.encoders if in_clip(encoder) is None]
    if not towers:
        return None
    clip = CLIPModel(CLIPConfig(vision_config=towers[0].config.to_dict()))
    return ClipCompanion(clip, tokenizer=None, decoder=SimpleNamespace(decode=None))


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What the family of one built model can do; weights on the meta device are enough."""
    modalities = [encoder.modality for encoder in adapter.encoders]
    first, why = adapter.lowest_layer
    refused = dict(REFUSED)
    generation = list(GENERATION)
    if len(modalities) > 1:
        generation += ["videos", "images and videos in one prompt"]
    if adapter.bidirectional_prompt:
        generation.remove("assisted decoding")
        refused["assisted decoding"] = "the whole prompt sees itself, and with it the tokens that an assistant guessed"
    if adapter.window is not None:
        refused["prompt and answer longer than a sliding window"] = (
            "a window over a shortened cache would see other tokens (the window is in the checkpoint's config)"
        )
    return {
        **_named(type(adapter)),
        "modalities": modalities,
        "sites": {site: _site(adapter, site) for site in SITES},
        "lowest_layer": {"layer": first, "reason": why or None},
        "positions": {policy: _refusal(adapter, (), policy) for policy in POSITIONS},
        "generation": generation,
        "refused": refused,
    }


def _named(cls: type[Adapter]) -> dict[str, Any]:
    return {"family": cls.family, "model_types": list(cls.model_types), "checkpoints": list(cls.checkpoints)}


def _site(adapter: Adapter, name: str) -> dict[str, Any]:
    """Whether stages can act at a site, and which signals they may read there."""
    index = {"layer": max(2, adapter.lowest_layer[0]), "tower": 1}.get(name)
    site = Site(name, index)
    reason = _refusal(adapter, (_probe(site),))
    if reason is not None:
        return {"available": False, "reason": reason}
    found: dict[str, Any] = {"available": True, "signals": [], "missing": {}}
    for signal in sorted(signals_at(name)):
        reason = _refusal(adapter, (_probe(site, Signal(signal)),))
        if reason is None:
            found["signals"].append(signal)
        else:
            found["missing"][signal] = adapter.unavailable(signal, name) or reason
    return found


def _probe(site: Site, *signals: Signal) -> _Probe:
    return _Probe(budget=Budget(tokens=1), at_site=site, reads=signals)


def _refusal(
    adapter: Adapter, methods: tuple[Method, ...], positions: str = "original", companion: ClipCompanion | None = None
) -> str | None:
    """Why a patch would be refused, None where it would not."""
    try:
        make_plan(adapter, methods, positions, None, companion)
    except VTCError as error:
        return str(error).removeprefix("probe at ").removeprefix(f"{methods[0].stages()[0].site}: " if methods else "")
    return None
