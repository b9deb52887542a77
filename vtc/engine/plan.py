"""Which stage acts where on one model; everything that can be refused is refused here, before anything changes."""

from dataclasses import dataclass

from vtc.adapter import Adapter
from vtc.errors import SignalUnavailableError, SpecError, UnsupportedFeatureError
from vtc.stages import Method, Signal, Stage
from vtc.tokens import Budget

#: the signals that the engine captures at each site
CAPTURED = {
    "tower_out": ("cls_attention", "cls_hidden", "received_attention", "keys"),
    "llm_in": ("text_embeds", "text_after"),
    "layer": (
        "keys",
        "normed_states",
        "position",
        "query_attention",
        "text_after",
        "text_keys",
        "text_position",
        "text_states",
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

    def at(self, site: str, index: int | None = None) -> tuple[Step, ...]:
        """The steps at one site."""
        return tuple(s for s in self.steps if s.stage.site.name == site and s.stage.site.index == index)

    def __deepcopy__(self, memo: object) -> "Plan":
        return self  # immutable, and a copied cache still belongs to it

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers at which a stage acts, ascending."""
        return tuple(sorted({s.stage.site.index or 0 for s in self.steps if s.stage.site.name == "layer"}))

    def signals(self, site: str, index: int | None = None) -> frozenset[Signal]:
        """Every signal that the steps at a site read."""
        return frozenset(signal for step in self.at(site, index) for signal in step.stage.signals)


def make_plan(adapter: Adapter, methods: tuple[Method, ...], positions: str, size_bias: bool) -> Plan:
    """Order the stages of `methods` and check that `adapter`'s model can run them.

    Raises:
        BudgetError: a stage has no budget.
        SpecError: a layer that the model does not have, or an unknown position policy.
        SignalUnavailableError: a stage reads what the model cannot give.
        UnsupportedFeatureError: a combination that would be wrong.
    """
    steps = [Step(method, stage, method.budget_for(stage)) for method in methods for stage in method.stages()]
    steps.sort(key=lambda step: step.stage.site.order)
    if positions == "auto":
        positions = methods[0].positions if methods and not adapter.multimodal_positions else "original"
    if positions not in ("original", "compact"):
        raise SpecError(f"positions={positions!r} is unknown. Use 'original', 'compact' or 'auto'.")
    if positions == "compact" and adapter.multimodal_positions:
        raise UnsupportedFeatureError(
            f"positions='compact' has no meaning for {adapter.family}, whose positions are places on the image "
            "(M-RoPE). Use positions='original', or 'auto'."
        )
    for step in steps:
        _check(adapter, step)
    plan = Plan(methods, tuple(steps), positions, size_bias)
    if size_bias and plan.layers:
        raise UnsupportedFeatureError(
            "size_bias=True works for tokens merged before the LLM; it is not carried through layer[k] stages. "
            "Use size_bias=False, or drop the in-LLM method."
        )
    return plan


def _check(adapter: Adapter, step: Step) -> None:
    site = step.stage.site
    if site.name in ("tower", "decode"):
        raise UnsupportedFeatureError(f"{step}: this version of the engine has no site {site.name!r} yet.")
    if site.name == "layer":
        count = len(adapter.layers)
        # layer 0 sees exactly what llm_in sees, but its signals come from a layer before it
        lowest = 1 if step.stage.signals else 0
        first, why = adapter.lowest_layer
        if lowest <= (site.index or 0) < first:
            raise SpecError(f"{step}: {why}. The first layer where this stage can act is {first}, e.g. '@{first}'.")
        if not lowest <= (site.index or 0) < count:
            raise SpecError(f"{step}: the LLM has layers {lowest}..{count - 1} where this stage can act (0-based).")
    if step.budget.per == "sample" and site.name == "tower_out":
        raise UnsupportedFeatureError(
            f"{step}: per='sample' cannot be met where images are encoded one by one. Use per='image'."
        )
    for signal in step.stage.signals:
        if signal.rows == "mean" and adapter.masks_outside:
            raise SignalUnavailableError(
                f"{step} reads {signal.name!r} of all query rows, which assumes causal attention, and the prompts of "
                f"{adapter.family} are partly bidirectional. Use query='last'."
            )
        if signal.name not in CAPTURED.get(site.name, ()) or (site.name == "tower_out" and signal.layer):
            other = f" of the layer {signal.layer:+d} from it" if signal.layer else ""
            raise SignalUnavailableError(
                f"{step} reads {signal.name!r}{other}, which the engine does not capture at {site.name} yet. "
                "See the options of the method for another score, or use a method that reads other signals."
            )
        reason = adapter.unavailable(signal.name, site.name)
        if reason is not None:
            raise SignalUnavailableError(
                f"{step} reads {signal.name!r}, which {adapter.family} cannot give: {reason}. "
                f"`vtc methods` shows methods without this signal."
            )
