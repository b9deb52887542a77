"""Everything that a model, a version or a combination cannot do, refused before anything changes."""

from vtc import settings
from vtc.adapter import Adapter
from vtc.companion import ClipCompanion, in_clip
from vtc.engine.host import masks, names
from vtc.engine.host.flash import is_flash
from vtc.engine.plan import Plan, Step, layer_of, source_layer
from vtc.errors import SignalUnavailableError, SpecError, UnsupportedFeatureError
from vtc.signals import ROWS, SIGNALS
from vtc.stages import Signal


def check_step(adapter: Adapter, step: Step, companion: ClipCompanion | None) -> None:
    site = step.stage.site
    if site.name == "tower":
        _check_tower(adapter, step)
    if site.name == "decode":
        raise UnsupportedFeatureError(f"{step}: this version of the engine has no site {site.name!r} yet.")
    if site.name == "layer":
        count = len(adapter.layers)
        # layer 0 sees exactly what llm_in sees, but its signals come from a layer before it
        index = layer_of(step)
        sources = [source_layer(0, signal) for signal in step.stage.signals]
        lowest = max((-source for source in sources if source is not None), default=0)
        first, why = (0, "") if step.stage.freezes else adapter.lowest_layer
        if step.stage.site.before_mlp:  # inside the layer before
            lowest, first = max(lowest, 1), first and first + 1
        if lowest <= index < first:
            raise SpecError(f"{step}: {why}. The first layer where this stage can act is {first}, e.g. '@{first}'.")
        if not lowest <= index < count:
            raise SpecError(f"{step}: the LLM has layers {lowest}..{count - 1} where this stage can act (0-based).")
        until, evict = step.stage.parks_until, step.stage.evicts_from
        if until is not None and not index < until < count:
            raise SpecError(
                f"{step}: tokens parked at layer {index} come back before a layer in {index + 1}..{count - 1}, "
                f"not {until}."
            )
        if evict is not None and not 0 <= evict < index:
            raise SpecError(f"{step}: evict={evict} is no layer before {index}.")
    if step.budget.per == "sample" and site.name in ("pixels", "tower", "tower_out"):
        raise UnsupportedFeatureError(
            f"{step}: per='sample' cannot be met where images are encoded one by one. Use per='image'."
        )
    if site.name == "pixels":
        reasons = [encoder.resize for encoder in adapter.encoders]
        if all(isinstance(reason, str) for reason in reasons):
            raise UnsupportedFeatureError(f"{step} cannot act on {adapter.family}: {reasons[0]}.")
    # what no option of a method can change comes first
    for signal in step.stage.signals:
        if "companion" not in SIGNALS[signal.name].of:
            _refuse(adapter, step, signal, adapter.unavailable(signal.name, _origin(step, signal)))
    for signal in step.stage.signals:
        _check_signal(adapter, step, signal, companion)


def check_together(adapter: Adapter, steps: list[Step]) -> None:
    """What single steps allow and their combination does not."""
    pixels = [step for step in steps if step.stage.site.name == "pixels"]
    inside_tower = [step for step in steps if step.stage.site.name in ("tower", "tower_out")]
    if len(pixels) > 1 or (pixels and inside_tower):
        raise UnsupportedFeatureError(
            f"{pixels[0]} makes the tower's grid smaller, and {[*pixels[1:], *inside_tower][0]} would act on it too. "
            "Use one of them; methods at llm_in and in the LLM go with either."
        )
    inside = [step for step in steps if step.stage.site.name == "layer"]
    frozen: dict[int, Step] = {}
    for step in inside:
        if step.stage.freezes:
            if layer_of(step) in frozen:
                raise SpecError(f"{step} and {frozen[layer_of(step)]} both freeze layer {layer_of(step)}. Keep one.")
            frozen[layer_of(step)] = step
    for step in inside:
        if step.stage.site.before_mlp and layer_of(step) - 1 in frozen:
            raise SpecError(
                f"{step} acts inside layer {layer_of(step) - 1}, in which {frozen[layer_of(step) - 1]} freezes tokens. "
                "Use before_mlp=False, or another layer."
            )
        for signal in step.stage.signals:
            source = source_layer(layer_of(step), signal)
            # what a layer at the site would make is made for the stage alone, of all that enters it
            if source is not None and source in frozen and source < layer_of(step):
                raise UnsupportedFeatureError(
                    f"{step} reads {signal.name!r} of layer {source}, in which {frozen[source]} lets no visual token "
                    f"ask. Move the stage to another layer, or do not freeze layer {source}."
                )
        until = step.stage.parks_until
        if until is None:
            continue
        for other in inside:
            evict = other.stage.evicts_from
            if evict is not None and evict < until:
                raise SpecError(
                    f"{other} evicts from layers in which {step} has tokens parked (until layer {until}). "
                    f"Evict from layer {until} on, or not at all."
                )
            overlaps = layer_of(step) <= layer_of(other) - other.stage.site.before_mlp < until
            if other is not step and not other.stage.freezes and overlaps:
                raise SpecError(
                    f"{other} acts while {step} has tokens parked until layer {until}. Let it act before "
                    f"layer {layer_of(step)} or from layer {until} on."
                )
    if frozen and is_flash(adapter):
        raise UnsupportedFeatureError(
            "frozen layers need a mask that flash attention cannot express. "
            "Load the model with attn_implementation='sdpa'."
        )


def check_positions(adapter: Adapter, positions: str) -> None:
    settings.check_positions(positions)
    if positions != "original" and adapter.multimodal_positions:
        raise UnsupportedFeatureError(
            f"positions={positions!r} has no meaning for {adapter.family}, whose positions are places on the image "
            "(M-RoPE). Use positions='original', or 'auto'."
        )
    if positions == "renumber" and not adapter.renumbers:
        raise UnsupportedFeatureError(
            f"positions='renumber' needs one rotary embedding for all layers, and {adapter.family} has several. "
            "Use positions='original' or 'compact'."
        )


def check_unmerge(adapter: Adapter, plan: Plan) -> None:
    """Virtual unmerging lets every token attend at its own place, so none may leave and none may move."""
    if plan.layers or plan.positions != "original" or plan.size_bias:
        raise UnsupportedFeatureError(
            "unmerge=True repeats merged tokens at all their places, which leaves nothing to do for layer[k] stages, "
            f"positions={plan.positions!r} or size_bias. Use unmerge=False, or methods that act before the LLM with "
            "positions='original'."
        )
    if plan.tower and all(encoder.pool is not None for encoder in adapter.encoders):
        raise UnsupportedFeatureError(
            f"unmerge=True on {adapter.family}, which makes one token of several patches behind its tower: tokens that "
            "the tower merged have no single place in the LLM. Use unmerge=False, or merge at llm_in."
        )
    first, why = adapter.lowest_layer
    if first:
        raise UnsupportedFeatureError(f"unmerge=True on {adapter.family}: {why}, and merged tokens have one row there.")


def check_biased(implementation: str | None) -> None:
    """Refuse `size_bias` in attention that takes no additive mask.

    Raises:
        UnsupportedFeatureError: neither eager nor sdpa.
    """
    if implementation not in masks.ADDITIVE:
        raise UnsupportedFeatureError(
            f"size_bias=True adds log(size) to attention logits, for which {implementation!r} has no argument. "
            "Load the model with attn_implementation='sdpa', or use size_bias=False."
        )


def _check_tower(adapter: Adapter, step: Step) -> None:
    reasons = [encoder.halves for encoder in adapter.encoders if isinstance(encoder.halves, str)]
    if reasons:
        raise UnsupportedFeatureError(
            f"{step} cannot act inside the vision tower of {adapter.family}: {reasons[0]}. "
            "Use a method at tower_out or llm_in."
        )
    reach, index = min(encoder.reach for encoder in adapter.encoders), step.stage.site.index
    if not isinstance(index, int) or not 0 <= index < reach:
        raise SpecError(
            f"{step}: {adapter.family} takes its features from block {reach - 1} of the tower, so that this stage can "
            f"act at the blocks 0..{reach - 1} (0-based)."
        )
    for encoder in adapter.encoders:
        implementation = names.attention_of(encoder.tower.config)
        if step.stage.weighs and implementation not in masks.ADDITIVE:
            raise UnsupportedFeatureError(
                f"{step} adds log(size) to the attention logits of the tower, for which {implementation!r} has no "
                "argument. Load the model with attn_implementation='sdpa', or turn the option off."
            )


def _check_signal(adapter: Adapter, step: Step, signal: Signal, companion: ClipCompanion | None) -> None:
    site, name, kind = step.stage.site, signal.name, SIGNALS[signal.name]
    if signal.rows not in ROWS:
        raise SpecError(f"{step}: rows={signal.rows!r} of {name!r} is unknown. Use one of: {', '.join(ROWS)}.")
    if signal.rows == "mean" and adapter.masks_outside:
        raise SignalUnavailableError(
            f"{step} reads {name!r} of all query rows, which assumes causal attention, and the prompts of "
            f"{adapter.family} are partly bidirectional. Use query='last'."
        )
    if site.name not in kind.sites:
        raise SignalUnavailableError(
            f"{step} reads {name!r}, which the engine does not capture at {site.name} yet. "
            "See the options of the method for another score, or use a method that reads other signals."
        )
    if "companion" in kind.of:
        reason = _companion_lacks(adapter, companion)
        if reason is not None:
            raise SignalUnavailableError(f"{step} reads {name!r}: {reason}. Or use relevance='llm' of the method.")
        return
    if site.name == "layer" and not kind.carried:
        latest = 0 if kind.layer == "ran" or step.stage.site.before_mlp else 1
        if kind.layer == "own" and step.stage.site.before_mlp:
            raise SignalUnavailableError(
                f"{step} reads {name!r} of layer {site.index}, and acts inside the layer before. Use before_mlp=False."
            )
        if signal.layer > latest:
            raise SignalUnavailableError(
                f"{step} reads {name!r} {signal.layer:+d} layers off, and what enters layer {site.index} can tell "
                f"nothing of that layer. Use layer={latest} or less."
            )
    _refuse(adapter, step, signal, adapter.unavailable(name, _origin(step, signal), signal.layer))


def _origin(step: Step, signal: Signal) -> str:
    """The site whose parts make a signal: what is carried comes from the encoder."""
    return "tower_out" if SIGNALS[signal.name].carried else step.stage.site.name


def _refuse(adapter: Adapter, step: Step, signal: Signal, reason: str | None) -> None:
    if reason is not None:
        raise SignalUnavailableError(
            f"{step} reads {signal.name!r}, which {adapter.family} cannot give: {reason}. "
            "See the options of the method for another score; `vtc methods` shows methods without this signal."
        )


def _companion_lacks(adapter: Adapter, companion: ClipCompanion | None) -> str | None:
    reasons = [in_clip(encoder) for encoder in adapter.encoders]
    if None not in reasons:
        return reasons[0]
    if companion is None:
        return (
            f"checkpoints of {adapter.family} hold neither CLIP's text tower nor its projections. Hand them over: "
            "vtc.patch(..., companion=vtc.ClipCompanion(clip, tokenizer, processor))"
        )
    reasons = [companion.unfit(encoder) for encoder in adapter.encoders]
    return None if None in reasons else reasons[0]
