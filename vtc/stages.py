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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from vtc.errors import BudgetError, SpecError
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

#: in the order in which a forward pass meets them
SITES = ("tower", "tower_out", "llm_in", "layer", "decode")

#: signal name -> what the tensor is, batch first and padded like the tokens
SIGNALS = {
    "cls_attention": "[B, N] probability that [CLS] gives each token at the feature layer, mean over heads",
    "cls_attention_layers": "[B, L, N] cls_attention of every tower layer, from the first to the feature layer",
    "cls_hidden": "[CLS] as the first token of x (num_prefix = 1)",
    "cls_query": "[B, H, d] query of [CLS] at the feature layer, as projected (unscaled)",
    "received_attention": "[B, N] attention each token receives at the feature layer, mean over heads and queries",
    "keys": "[B, H, N, d] keys at the feature layer (tower) or after RoPE at the layer before the site (LLM)",
    "query_attention": "[B, N] probability the query rows (last token, or mean over all) give each visual token",
    "position": "[B, N] int64 place of each visual token in the prompt",
    "clip_image_embeds": "[B, N, E] patches in CLIP's joint space: visual_projection(post_layernorm(feature layer))",
    "clip_text_embeds": "[B, M, E] CLIP text embeddings of the question, one per 77 tokens; zero rows are padding",
    "low_keys": "[B, H, N, d] keys at tower block `Signal.layer`, counted from the first (0-based)",
    "tile": "[B, 4] int64 of a group that is a tile: number of its image in the batch, its number in the image (0: the "
    "full image), (height, width) of the image in tiles; (b, 0, 0, 0) for an image without tiles",
    "normed_states": "[B, N, D] hidden states after the LLM's final norm",
    "text_embeds": "[B, T, D] embeddings of the sample's text tokens, padded; text_mask says which are valid",
    "text_keys": "[B, H, T, d] keys of the text tokens after RoPE at the layer before the site",
    "text_states": "[B, T, D] hidden states of the text tokens after the LLM's final norm",
    "text_position": "[B, T] int64 place of each text token in the prompt",
    "text_after": "[B, T] whether the text token stands after the last visual token of the sample",
    "text_attention": "[B, T, N] probability each text row gives each visual token, mean over heads",
    "attention_to_text": "[B, N, T] probability each visual row gives each text token, mean over heads",
    "attention_output": "[B, N, D] output of the self-attention (after o_proj) at the layer before the site",
    "global_attention": "[B, N] probability the mean query of all tokens up to the last visual one gives each visual "
    "token, among those tokens, at the layer itself, without RoPE, mean over heads",
    "layer_keys": "[B, G, N, d] keys of the layer itself (of the hidden states that enter it), after RoPE",
}


@dataclass(frozen=True)
class Site:
    """Where a stage acts: "tower_out", "llm_in", "layer[k]" ... (k is 0-based).

    Example:
        >>> str(Site("layer", 2)), str(Site("tower_out"))
        ('layer[2]', 'tower_out')
    """

    name: str
    index: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SITES:
            raise SpecError(f"site {self.name!r} is unknown. Sites: {', '.join(SITES)}.")
        if (self.index is not None) != (self.name in ("tower", "layer")):
            raise SpecError(f"site {self.name!r} with index {self.index}: only tower[i] and layer[k] have an index.")

    @property
    def order(self) -> tuple[int, int]:
        return SITES.index(self.name), self.index or 0

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True)
class Signal:
    """What a stage reads beside the features.

    Args:
        name: one of `SIGNALS`.
        layer: layer offset relative to the default one (tower: the layer whose output is the feature; LLM: the layer
            before the site).
        rows: for query_attention: "last" or "mean".
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


def drop(tokens: Tokens, keep: Int[Tensor, "B K"], links: Links | None) -> TokenMap:
    """The compress rule of plain pruning: what does not stay is gone."""
    return TokenMap.select(keep, tokens.x.shape[1], keep_lengths(tokens, keep))


def keep_lengths(tokens: Tokens, keep: Int[Tensor, "B K"]) -> tuple[int, ...]:
    """Slots of each group, known without asking the device: a filter returns as many tokens as the budget says."""
    return tuple(min(k, keep.shape[1]) for k in tokens.budget)


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
    """

    site: Site
    filter: Filter
    correlate: Correlate | None = None
    compress: Compress = drop
    signals: tuple[Signal, ...] = ()
    pool: Literal["image", "sample"] = "image"
    budget: Budget | None = None

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
    #: adaptive, random, video, query_aware, merges, needs_grid, permutation_equivariant
    tags: ClassVar[frozenset[str]] = frozenset()
    #: position ids that the paper's code uses
    positions: ClassVar[Literal["original", "compact"]] = "original"
    #: the field that "@" of a spec string sets
    at: ClassVar[str | None] = None
    #: family -> budget of the paper's main setting, with its source in the docstring of the method
    defaults: ClassVar[dict[str, int | float]] = {}

    budget: Budget | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validate; subclasses extend it."""
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise BudgetError(
                f"budget={self.budget!r} of method {self.slug!r} is no Budget. Use Budget(tokens=64), or "
                f"vtc.create({self.slug!r}, budget=64)."
            )

    def stages(self) -> tuple[Stage, ...]:
        """The stages, in the order of their sites."""
        raise NotImplementedError

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
        """A plain dict that `vtc.registry.from_dict` turns into an equal method."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "budget"}
        budget = None if self.budget is None else dataclasses.asdict(self.budget)
        return {"version": 1, "method": self.slug, "budget": budget, **fields}


def check_choice(method: Method, name: str, allowed: tuple[str, ...]) -> None:
    """Validate the field `name` of `method`.

    Raises:
        SpecError: it is none of `allowed`.
    """
    value = getattr(method, name)
    if value not in allowed:
        raise SpecError(f"{name}={value!r} of method {method.slug!r} is unknown. Use one of: {', '.join(allowed)}.")
