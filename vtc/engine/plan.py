"""Which stage acts where on one model; everything that can be refused is refused here, before anything changes."""

from dataclasses import dataclass

from vtc.adapter import Adapter
from vtc.companion import ClipCompanion, in_clip
from vtc.engine.host import contract, names
from vtc.engine.host.flash import is_flash
from vtc.errors import SignalUnavailableError, SpecError, UnsupportedFeatureError
from vtc.stages import Method, Signal, Stage
from vtc.tokens import Budget

#: signals of the encoder that are carried to the places of the tokens in the prompt
CARRIED = ("cls_attention", "received_attention", "clip_image_embeds", "clip_text_embeds")

#: signals made of the queries and keys of one decoder layer
ATTENTION_SIGNALS = (
    "attention_to_text",
    "global_attention",
    "keys",
    "layer_keys",
    "queries",
    "query_attention",
    "query_logits",
    "sequence_keys",
    "sequence_queries",
    "sequence_row",
    "sequence_valid",
    "text_attention",
    "text_attention_heads",
    "text_gravity",
    "text_keys",
    "text_queries",
)

#: those of them that always belong to the layer at the site
OWN = ("global_attention", "layer_keys")

#: signals that a layer gives when it has run
OUTPUTS = ("attention_output", "layer_input", "mlp_input")

#: query rows that a signal may be asked for
ROWS = ("last", "text", "mean")

#: attention implementations that take an additive mask
BIASED = ("eager", "sdpa")

#: the signals that the engine captures at each site
CAPTURED = {
    "pixels": ("square_grid",),
    "tower": ("cls_attention", "keys", "queries", "received_attention", "sizes"),
    "tower_out": (
        "cls_attention",
        "cls_attention_layers",
        "cls_hidden",
        "cls_logits",
        "cls_query",
        "keys",
        "low_keys",
        "received_attention",
        "tile",
    ),
    "llm_in": (*CARRIED, "text_embeds", "text_after"),
    "layer": (
        *CARRIED,
        *ATTENTION_SIGNALS,
        *OUTPUTS,
        "normed_states",
        "position",
        "text_after",
        "text_embeds",
        "text_position",
        "text_states",
        "visual_embeds",
    ),
}


@dataclass(frozen=True)
class Step:
    """A stage of a method together with its budget."""

    method: Method
    stage: Stage
    budget: Budget

    def __str__(self) -> str:
        return f"{self.method.slug} at {self.stage.site}"


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of all methods in the order of their sites, and how positions and sizes are treated.

    Compared by identity: caches and encoded features remember under which plan they were made.
    """

    methods: tuple[Method, ...]
    steps: tuple[Step, ...]
    positions: str
    size_bias: bool
    companion: ClipCompanion | None = None
    unmerge: bool = False

    def at(self, site: str, index: int | None = None) -> tuple[Step, ...]:
        """The steps at one site."""
        return tuple(s for s in self.steps if s.stage.site.name == site and s.stage.site.index == index)

    @property
    def tower(self) -> dict[int, tuple[Step, ...]]:
        """The steps at each block of the vision tower."""
        sites = [step.stage.site for step in self.steps if step.stage.site.name == "tower"]
        blocks = {site.index for site in sites if isinstance(site.index, int)}
        return {index: self.at("tower", index) for index in sorted(blocks)}

    def __deepcopy__(self, memo: object) -> "Plan":
        return self  # immutable, and a copied cache still belongs to it

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers at which a stage acts, ascending."""
        return tuple(sorted({layer_of(s) for s in self.steps if s.stage.site.name == "layer"}))

    @property
    def reference(self) -> int:
        """The first decoder layer that sees every token that entered the LLM; masks are sized by it."""
        return next((int(s.stage.until or 0) for s in self.at("layer", 0) if s.stage.leave == "park"), 0)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Decoder layers in which visual tokens are frozen, ascending."""
        return tuple(sorted({layer_of(s) for s in self.steps if s.stage.leave == "freeze"}))

    def signals(self, site: str, index: int | None = None) -> frozenset[Signal]:
        """Every signal that the steps at a site read."""
        return frozenset(signal for step in self.at(site, index) for signal in step.stage.signals)


def make_plan(
    adapter: Adapter,
    methods: tuple[Method, ...],
    positions: str,
    size_bias: bool | None,
    companion: ClipCompanion | None = None,
    unmerge: bool | None = None,
) -> Plan:
    """Order the stages of `methods` and check that `adapter`'s model can run them.

    `size_bias` and `unmerge` None: what the methods' papers do.

    Raises:
        UnsupportedModelError: the installed transformers is not one that was tested, or its words have changed.
        BudgetError: a stage has no budget.
        SpecError: a layer that the model does not have, or an unknown position policy.
        SignalUnavailableError: a stage reads what the model cannot give.
        UnsupportedFeatureError: a combination that would be wrong.
    """
    contract.check(adapter)
    depth = {"layer": len(adapter.layers), "tower": min(encoder.reach for encoder in adapter.encoders)}
    steps = [
        Step(method, stage, method.budget_for(stage))
        for method in methods
        for general in method.stages_in(len(adapter.layers))
        for stage in general.at_depth(depth.get(general.site.name, 0)).repeated(depth.get(general.site.name, 0))
    ]
    steps.sort(key=lambda step: step.stage.site.order)
    virtual = any(method.unmerges for method in methods) if unmerge is None else unmerge
    if positions == "auto":
        positions = "original" if virtual else _published_positions(adapter, methods)
    _check_positions(adapter, positions)
    for step in steps:
        _check(adapter, step, companion)
    _check_together(adapter, steps)
    biased = any(method.size_bias for method in methods) if size_bias is None else size_bias
    if biased:
        check_biased(names.attention_of(adapter.text_config))
    plan = Plan(methods, tuple(steps), positions, biased, companion, virtual)
    if virtual:
        _check_unmerge(adapter, plan)
    return plan


def _check_unmerge(adapter: Adapter, plan: Plan) -> None:
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
    if implementation not in BIASED:
        raise UnsupportedFeatureError(
            f"size_bias=True adds log(size) to attention logits, for which {implementation!r} has no argument. "
            "Load the model with attn_implementation='sdpa', or use size_bias=False."
        )


def layer_of(step: Step) -> int:
    """The decoder layer of a step at layer[k]."""
    assert isinstance(step.stage.site.index, int)
    return step.stage.site.index


def _published_positions(adapter: Adapter, methods: tuple[Method, ...]) -> str:
    """What the first method's paper does, as far as it has a meaning for the model."""
    if not methods or adapter.multimodal_positions:
        return "original"
    published = methods[0].positions
    return "compact" if published == "renumber" and not adapter.renumbers else published


def _check_positions(adapter: Adapter, positions: str) -> None:
    if positions not in ("original", "compact", "renumber"):
        raise SpecError(f"positions={positions!r} is unknown. Use 'original', 'compact', 'renumber' or 'auto'.")
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


def _check_together(adapter: Adapter, steps: list[Step]) -> None:
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
        if step.stage.leave == "freeze":
            if layer_of(step) in frozen:
                raise SpecError(f"{step} and {frozen[layer_of(step)]} both freeze layer {layer_of(step)}. Keep one.")
            frozen[layer_of(step)] = step
    for step in inside:
        if step.stage.before_mlp and layer_of(step) - 1 in frozen:
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
        if step.stage.until is None:
            continue
        for other in inside:
            if other.stage.evict is not None and other.stage.evict < step.stage.until:
                raise SpecError(
                    f"{other} evicts from layers in which {step} has tokens parked (until layer {step.stage.until}). "
                    f"Evict from layer {step.stage.until} on, or not at all."
                )
            overlaps = layer_of(step) <= layer_of(other) - other.stage.before_mlp < step.stage.until
            if other is not step and other.stage.leave != "freeze" and overlaps:
                raise SpecError(
                    f"{other} acts while {step} has tokens parked until layer {step.stage.until}. Let it act before "
                    f"layer {layer_of(step)} or from layer {step.stage.until} on."
                )
    if frozen and is_flash(adapter):
        raise UnsupportedFeatureError(
            "frozen layers need a mask that flash attention cannot express. "
            "Load the model with attn_implementation='sdpa'."
        )


def _check(adapter: Adapter, step: Step, companion: ClipCompanion | None) -> None:
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
        first, why = (0, "") if step.stage.leave == "freeze" else adapter.lowest_layer
        if step.stage.before_mlp:  # inside the layer before
            lowest, first = max(lowest, 1), first and first + 1
        if lowest <= index < first:
            raise SpecError(f"{step}: {why}. The first layer where this stage can act is {first}, e.g. '@{first}'.")
        if not lowest <= index < count:
            raise SpecError(f"{step}: the LLM has layers {lowest}..{count - 1} where this stage can act (0-based).")
        if step.stage.until is not None and not index < step.stage.until < count:
            raise SpecError(
                f"{step}: tokens parked at layer {index} come back before a layer in {index + 1}..{count - 1}, "
                f"not {step.stage.until}."
            )
        if step.stage.evict is not None and not 0 <= step.stage.evict < index:
            raise SpecError(f"{step}: evict={step.stage.evict} is no layer before {index}.")
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
        where = "tower_out" if signal.name in CARRIED else site.name
        if not signal.name.startswith("clip_"):
            _refuse(adapter, step, signal, adapter.unavailable(signal.name, where))
    for signal in step.stage.signals:
        _check_signal(adapter, step, signal, companion)


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
        if step.stage.proportional and implementation not in ("eager", "sdpa"):
            raise UnsupportedFeatureError(
                f"{step} adds log(size) to the attention logits of the tower, for which {implementation!r} has no "
                "argument. Load the model with attn_implementation='sdpa', or turn the option off."
            )


def _check_signal(adapter: Adapter, step: Step, signal: Signal, companion: ClipCompanion | None) -> None:
    site, name = step.stage.site, signal.name
    if signal.rows not in ROWS:
        raise SpecError(f"{step}: rows={signal.rows!r} of {name!r} is unknown. Use one of: {', '.join(ROWS)}.")
    if signal.rows == "mean" and adapter.masks_outside:
        raise SignalUnavailableError(
            f"{step} reads {name!r} of all query rows, which assumes causal attention, and the prompts of "
            f"{adapter.family} are partly bidirectional. Use query='last'."
        )
    if name not in CAPTURED.get(site.name, ()):
        raise SignalUnavailableError(
            f"{step} reads {name!r}, which the engine does not capture at {site.name} yet. "
            "See the options of the method for another score, or use a method that reads other signals."
        )
    if name.startswith("clip_"):
        reason = _companion_lacks(adapter, companion)
        if reason is not None:
            raise SignalUnavailableError(f"{step} reads {name!r}: {reason}. Or use relevance='llm' of the method.")
        return
    if site.name == "layer" and name not in CARRIED:
        latest = 0 if name in OUTPUTS or step.stage.before_mlp else 1
        if name in OWN and step.stage.before_mlp:
            raise SignalUnavailableError(
                f"{step} reads {name!r} of layer {site.index}, and acts inside the layer before. Use before_mlp=False."
            )
        if signal.layer > latest:
            raise SignalUnavailableError(
                f"{step} reads {name!r} {signal.layer:+d} layers off, and what enters layer {site.index} can tell "
                f"nothing of that layer. Use layer={latest} or less."
            )
    where = "tower_out" if name in CARRIED else site.name
    _refuse(adapter, step, signal, adapter.unavailable(name, where, signal.layer))


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


def source_layer(index: int, signal: Signal) -> int | None:
    """The decoder layer that a signal of a stage at layer `index` is made in; None: in none."""
    if signal.name in OWN:
        return index
    return index - 1 + signal.layer if signal.name in (*ATTENTION_SIGNALS, *OUTPUTS) else None
