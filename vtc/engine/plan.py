"""Which stage acts where on one model; made by `vtc.engine.planning`."""

import functools
from dataclasses import dataclass

from vtc.companion import ClipCompanion
from vtc.signals import SIGNALS
from vtc.stages import Method, Signal, Stage
from vtc.tokens import Budget


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

    @functools.cached_property
    def tower(self) -> dict[int, tuple[Step, ...]]:
        """The steps at each block of the vision tower."""
        sites = [step.stage.site for step in self.steps if step.stage.site.name == "tower"]
        blocks = {site.index for site in sites if isinstance(site.index, int)}
        return {index: self.at("tower", index) for index in sorted(blocks)}

    def __deepcopy__(self, memo: object) -> "Plan":
        return self  # immutable, and a copied cache still belongs to it

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers at which a stage acts, ascending."""
        return tuple(sorted({layer_of(s) for s in self.steps if s.stage.site.name == "layer"}))

    @functools.cached_property
    def reference(self) -> int:
        """The first decoder layer that sees every token that entered the LLM; masks are sized by it."""
        return next((int(s.stage.parks_until) for s in self.at("layer", 0) if s.stage.parks_until is not None), 0)

    @functools.cached_property
    def frozen(self) -> tuple[int, ...]:
        """Decoder layers in which visual tokens are frozen, ascending."""
        return tuple(sorted({layer_of(s) for s in self.steps if s.stage.freezes}))

    @functools.cached_property
    def carried(self) -> tuple[Signal, ...]:
        """The encoder signals that stages behind the encoder read."""
        steps = [step for step in self.steps if step.stage.site.name in ("llm_in", "layer")]
        found = {s for step in steps for s in step.stage.signals if SIGNALS[s.name].carried}
        return tuple(sorted(found, key=lambda s: (s.name, s.layer)))

    def signals(self, site: str, index: int | None = None) -> frozenset[Signal]:
        """Every signal that the steps at a site read."""
        return frozenset(signal for step in self.at(site, index) for signal in step.stage.signals)


def layer_of(step: Step) -> int:
    """The decoder layer of a step at layer[k]."""
    assert isinstance(step.stage.site.index, int)
    return step.stage.site.index


def source_layer(index: int, signal: Signal) -> int | None:
    """The decoder layer that a signal of a stage at layer `index` is made in; None: in none."""
    made = SIGNALS[signal.name].layer
    if made == "own":
        return index
    return None if made is None else index - 1 + signal.layer
