"""Sites, signals, stages and the base class of every method.

A method is a frozen dataclass that lists stages. A stage is a *site* (where) and three small pure functions (how):

    filter(tokens)                  -> which tokens stay               int64 [B, K], padding -1 at the end
    correlate(tokens, keep)         -> who is merged into whom         Links, or None
    compress(tokens, keep, links)   -> the map that builds what stays  TokenMap

It never sees a model, a hook, a cache or a device: the engine captures what the stage declares, calls it and applies
the map.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vtc.errors import BudgetError, SpecError
from vtc.options import check_options
from vtc.signals import SIGNALS
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

#: in the order in which a forward pass meets them
SITES = ("pixels", "tower", "tower_out", "llm_in", "layer", "decode")


@dataclass(frozen=True)
class Site:
    """Where a stage acts: "tower_out", "llm_in", "layer[k]" ... (k is 0-based).

    A float index is a share of the depth, for methods whose paper counts so; the engine makes it a layer of the model.

    With `before_mlp`, a stage at layer[k] acts inside layer k-1, between its attention and its MLP, which then runs on
    what is left. Keys and values, and all later layers, are those of a stage before layer k.

    Example:
        >>> str(Site("layer", 2)), str(Site("tower_out")), str(Site("layer", 0.5)), str(Site("layer", 0.5).at_depth(32))
        ('layer[2]', 'tower_out', 'layer[50%]', 'layer[16]')
    """

    name: str
    index: int | float | None = None
    before_mlp: bool = False

    def __post_init__(self) -> None:
        if self.name not in SITES:
            raise SpecError(f"site {self.name!r} is unknown. Sites: {', '.join(SITES)}.")
        if (self.index is not None) != (self.name in ("tower", "layer")):
            raise SpecError(f"site {self.name!r} with index {self.index}: only tower[i] and layer[k] have an index.")
        if isinstance(self.index, float) and not 0.0 < self.index < 1.0:
            raise SpecError(f"site {self.name!r} at {self.index}: a share of the depth lies between 0 and 1.")
        if self.before_mlp and self.name != "layer":
            raise SpecError(f"site {self.name!r} with before_mlp: only layer[k] stages can act before an MLP.")

    @property
    def order(self) -> tuple[int, int | float]:
        return SITES.index(self.name), self.index or 0

    def at_depth(self, layers: int) -> "Site":
        """The same place in a model of `layers` layers."""
        return replace(self, index=at_depth(self.index, layers)) if isinstance(self.index, float) else self

    def __str__(self) -> str:
        if self.index is None:
            return self.name
        return f"{self.name}[{self.index:.0%}]" if isinstance(self.index, float) else f"{self.name}[{self.index}]"


def at_depth(index: int | float, layers: int) -> int:
    """A layer given by its number or as a share of the depth, as a number between 1 and the last one."""
    return max(1, min(layers - 1, round(index * layers))) if isinstance(index, float) else index


@dataclass(frozen=True)
class Signal:
    """What a stage reads beside the features.

    Args:
        name: one of `vtc.signals.SIGNALS`.
        layer: layer offset relative to the default one (tower: the block whose output is the feature; LLM: the layer
            before the site, so that 1 is the layer at the site itself, read from the states that enter it).
        rows: for query_attention and query_logits: "last" (last row of the prompt), "text" (mean over the text behind
            the last visual token of the sample, over all of its text where nothing follows) or "mean" (all rows).
    """

    name: str
    layer: int = 0
    rows: str = "last"

    def __post_init__(self) -> None:
        if self.name not in SIGNALS:
            raise SpecError(f"signal {self.name!r} is unknown. Signals: {', '.join(SIGNALS)}.")


class Links(NamedTuple):
    """Edges from tokens that go to slots that stay; slot -1 is padding."""

    source: Int[Tensor, "B E"]
    slot: Int[Tensor, "B E"]
    weight: Float[Tensor, "B E"]


Filter = Callable[[Tokens], Tensor]
Correlate = Callable[[Tokens, Tensor], Links]
Compress = Callable[[Tokens, Tensor, Links | None], TokenMap]
Schedule = Callable[[int, int], int]
Pace = Callable[[int, int, int, int], int]
Carry = Callable[[Tokens], Tensor]


def drop(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """The compress rule of plain pruning: what does not stay is gone."""
    return TokenMap.select(keep, tokens.x.shape[1], keep_lengths(tokens, keep))


def keep_lengths(tokens: Tokens, keep: Int[Tensor, "B K"]) -> tuple[int, ...]:
    """Slots of each group, known without asking the device: a filter returns as many tokens as the budget says."""
    return tuple(min(k, keep.shape[1]) for k in tokens.budget)


def nothing(tokens: Tokens) -> Int[Tensor, "B 0"]:
    """The filter after which no token stays: every visual token is frozen, say."""
    return torch.empty(len(tokens.lengths), 0, dtype=torch.long, device=tokens.x.device)


@dataclass(frozen=True)
class Leave:
    """What becomes of the tokens that do not stay: `Drop`, `Weigh`, `Park` or `Freeze`."""

    #: what the stage does, for messages
    verb: ClassVar[str]

    @property
    def site(self) -> str | None:
        """The only site where this is possible; None: it is everywhere."""
        return "layer"

    def at_depth(self, layers: int) -> "Leave":
        """The same in an LLM of `layers` layers: shares of the depth become numbers."""
        return self


@dataclass(frozen=True)
class Drop(Leave):
    """They are gone from here on.

    Args:
        evict: for layer[k]: after the prefill, the caches of the layers evict .. k - 1 are cut to the tokens that enter
            layer k (a float is a share of the depth); None: they keep what they saw.
    """

    verb = "evicts from caches"
    evict: int | float | None = None

    def __post_init__(self) -> None:
        if self.evict is not None:
            _check_layer("evict", self.evict, 0)

    @property
    def site(self) -> str | None:
        return None if self.evict is None else "layer"

    def at_depth(self, layers: int) -> "Drop":
        return self if self.evict is None else Drop(at_depth(self.evict, layers))


@dataclass(frozen=True)
class Weigh(Leave):
    """They are gone from block i of the tower on, and later blocks add log(size) of merged tokens to their logits."""

    verb = "weighs merged tokens by their sizes"

    @property
    def site(self) -> str | None:
        return "tower"


@dataclass(frozen=True)
class Park(Leave):
    """They skip the layers k .. until - 1 and come back, unchanged, before layer `until`. Such a stage cannot merge.

    Args:
        until: that layer (a float is a share of the depth).
    """

    verb = "parks tokens"
    until: int | float

    def __post_init__(self) -> None:
        _check_layer("until", self.until, 1)

    def at_depth(self, layers: int) -> "Park":
        return Park(at_depth(self.until, layers))


@dataclass(frozen=True)
class Freeze(Leave):
    """In layer k they are neither queries nor pass the MLP, but others see their keys and values of that layer.

    Such a stage cannot merge.
    """

    verb = "freezes tokens"


def _check_layer(name: str, value: int | float, least: int) -> None:
    is_layer = 0.0 < value < 1.0 if isinstance(value, float) else isinstance(value, int) and value >= least
    if not is_layer:
        raise SpecError(
            f"{name}={value!r} is neither the number of a decoder layer ({least} or more) nor a share of the depth "
            "between 0 and 1."
        )


@dataclass(frozen=True)
class Repeat:
    """The schedule of a stage that acts at its site and at every later block up to the feature layer, or layer.

    Args:
        pace: (N, k, i, n) -> how many of N tokens stay after the i-th (from 0) of n repetitions.
        carry: at tower[i], what the repetitions hand on: from the tokens of one block, a tensor [B, ...] that the next
            one reads as `tokens.signals["carried"]`; the first one has none.
    """

    pace: Pace
    carry: Carry | None = None


@dataclass(frozen=True)
class _Turn:
    """Repetition number `index` (from 0) of `count`."""

    repeat: Repeat
    index: int
    count: int

    def __call__(self, total: int, budget: int) -> int:
        return self.repeat.pace(total, budget, self.index, self.count)


@dataclass(frozen=True)
class Stage:
    """One decision at one site.

    Args:
        site: where.
        filter: which tokens stay.
        correlate: who is merged into whom; None is plain pruning.
        compress: builds the map; `drop` by default.
        signals: what the engine must capture.
        pool: whether the tokens of one image or all visual tokens of a sample compete with each other.
        budget: what stays after this stage; None: the budget of the method.
        schedule: (N, k) -> how many of a group of originally N tokens stay after this stage, where the budget leaves k
            of them; None: k. For methods that drop in several steps; 0 in the LLM drops all. A `Repeat` makes the stage
            act at later blocks or layers too.
        leave: what becomes of the tokens that do not stay.
    """

    site: Site
    filter: Filter
    correlate: Correlate | None = None
    compress: Compress = drop
    signals: tuple[Signal, ...] = ()
    pool: Literal["image", "sample"] = "image"
    budget: Budget | None = None
    schedule: Schedule | Repeat | None = None
    leave: Leave = Drop()

    def __post_init__(self) -> None:
        name, leave, repeat = self.site.name, self.leave, self.schedule
        if not isinstance(leave, Leave):
            raise SpecError(
                f"a stage at {self.site} has leave={leave!r}. Use Drop(), Weigh(), Park(until=...) or Freeze() of "
                "vtc.stages."
            )
        if leave.site not in (None, name):
            where = "layer[k]" if leave.site == "layer" else "tower[i]"
            raise SpecError(f"a stage at {self.site} {leave.verb}, which only {where} stages can.")
        if self.site.before_mlp and not isinstance(leave, Drop):
            raise SpecError(f"a stage at {self.site} {leave.verb}, which layer[k] stages with before_mlp cannot.")
        if isinstance(repeat, Repeat) and name not in ("tower", "layer"):
            raise SpecError(f"a stage at {self.site} repeats, which only tower[i] and layer[k] stages can.")
        if isinstance(repeat, Repeat) and repeat.carry is not None and name != "tower":
            raise SpecError(f"a stage at {self.site} carries something on, which only tower[i] stages can.")

    def at_depth(self, layers: int) -> "Stage":
        """The same stage where its site has `layers` layers or blocks: shares of the depth become numbers."""
        if self.site.name not in ("tower", "layer"):
            return self
        return replace(self, site=self.site.at_depth(layers), leave=self.leave.at_depth(layers))

    @property
    def place(self) -> str:
        """The site for tables; "tower[4..]" where the stage acts at every later block too."""
        return f"{str(self.site)[:-1]}..]" if isinstance(self.schedule, Repeat) else str(self.site)

    @property
    def weighs(self) -> bool:
        """Whether later blocks of the tower add log(size) of merged tokens to their attention logits."""
        return isinstance(self.leave, Weigh)

    @property
    def freezes(self) -> bool:
        """Whether the tokens that do not stay are frozen in this layer."""
        return isinstance(self.leave, Freeze)

    @property
    def parks_until(self) -> int | float | None:
        """The layer before which parked tokens come back; None: none is parked."""
        return self.leave.until if isinstance(self.leave, Park) else None

    @property
    def evicts_from(self) -> int | float | None:
        """The first layer whose cache is cut after the prefill; None: none is."""
        return self.leave.evict if isinstance(self.leave, Drop) else None

    @property
    def carry(self) -> Carry | None:
        """What the repetitions of this stage hand on; None: nothing."""
        repeat = self.schedule.repeat if isinstance(self.schedule, _Turn) else self.schedule
        return repeat.carry if isinstance(repeat, Repeat) else None

    def repeated(self, depth: int) -> "tuple[Stage, ...]":
        """The stages that this one stands for where its site has `depth` blocks or layers."""
        first, repeat = self.site.index, self.schedule
        if not isinstance(repeat, Repeat) or not isinstance(first, int) or first >= depth:
            return (self,)
        return tuple(
            replace(self, site=replace(self.site, index=first + i), schedule=_Turn(repeat, i, depth - first))
            for i in range(depth - first)
        )

    def count(self, total: int, budget: int) -> int:
        """How many of a group of originally `total` tokens stay by the schedule, where the budget leaves `budget`."""
        assert not isinstance(self.schedule, Repeat), "ask the stages of repeated()"
        return budget if self.schedule is None else self.schedule(total, budget)

    def decide(self, tokens: Tokens) -> TokenMap:
        """The map after which group b holds `tokens.budget[b]` tokens (adaptive methods: at most)."""
        keep = self.filter(tokens)
        links = self.correlate(tokens, keep) if self.correlate is not None else None
        return self.compress(tokens, keep, links)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    venue: str = ""


@dataclass(frozen=True)
class Method:
    """Base class: a frozen dataclass whose fields are the paper's parameters.

    Subclasses set the class attributes, add their fields and implement `stages`.

    Args:
        budget: what stays; None: given by `patch`.
    """

    slug: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    #: filter / correlate / compress in one line each, for the tables
    steps: ClassVar[tuple[str, str, str]]
    #: "golden" (equal to the authors' code), "paper" (checked against the text), "reconstructed", "control"
    fidelity: ClassVar[str]
    #: one published number: model, budget and what it counts, metric, value, where it was read; "": none was read.
    #: It belongs to the class that was measured, and subclasses do not inherit it
    headline: ClassVar[str] = ""
    #: what the default setting needs beside a stock checkpoint, for the tables
    requires: ClassVar[str] = ""
    #: adaptive, random, video, query_aware, merges, needs_grid, permutation_equivariant, drops_all (may leave no token)
    tags: ClassVar[frozenset[str]] = frozenset()
    #: position ids that the paper's code uses
    positions: ClassVar[Literal["original", "compact", "renumber"]] = "original"
    #: whether the LLM adds log(size) of merged tokens to their attention logits
    size_bias: ClassVar[bool] = False
    #: whether the LLM sees merged tokens at all their places (virtual unmerging)
    unmerges: ClassVar[bool] = False
    #: the field that "@" of a spec string sets
    at: ClassVar[str | None] = None
    #: family -> budget of the paper's main setting, with its source in the docstring of the method
    defaults: ClassVar[dict[str, int | float]] = {}

    budget: Budget | None = dataclasses.field(default=None, kw_only=True)

    @property
    def wants_budget(self) -> bool:
        """Whether a budget given for all methods together is meant for this one too."""
        return True

    def __post_init__(self) -> None:
        """Validate the budget, and options by their rules (`vtc.options`); subclasses add what several must fulfil."""
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise BudgetError(
                f"budget={self.budget!r} of method {self.slug!r} is no Budget. Use Budget(tokens=64), or "
                f"vtc.create({self.slug!r}, budget=64)."
            )
        check_options(self)

    def stages(self) -> tuple[Stage, ...]:
        """The stages, in the order of their sites."""
        raise NotImplementedError

    def stages_in(self, layers: int) -> tuple[Stage, ...]:
        """The stages in an LLM of `layers` decoder layers, for methods that were calibrated for one depth."""
        return self.stages()

    def budget_for(self, stage: Stage) -> Budget:
        """The budget of `stage`.

        Raises:
            BudgetError: nobody gave one.
        """
        budget = stage.budget or self.budget
        if budget is None:
            raise BudgetError(
                f"method {self.slug!r} has no budget. Use budget=64, or '{self.slug}:64' in a spec string."
            )
        return budget

    def options(self) -> dict[str, Any]:
        """The fields that differ from their default, without the budget."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "budget" and getattr(self, f.name) != f.default
        }

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `vtc.catalogue.registry.from_dict` turns into an equal method."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "budget"}
        budget = None if self.budget is None else dataclasses.asdict(self.budget)
        return {"version": 1, "method": self.slug, "budget": budget, **fields}
