"""DyMU: merge what is more similar than a calibrated threshold in every block of the tower, unmerge it in the LLM."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from vtc.calibration import stored_options
from vtc.catalogue.registry import register
from vtc.errors import SpecError
from vtc.kernels import bipartite_match
from vtc.options import Count, OneOf, Within
from vtc.primitives import bipartite_keep, bipartite_links, settle, size_weighted_merge
from vtc.stages import Drop, Links, Method, Paper, Repeat, Signal, Site, Stage, Weigh
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

SCHEDULES = ("constant", "linear", "reverse_linear")


def merge_counts(total: int, blocks: int, schedule: str) -> list[int]:
    """How many of `total` tokens each block merges.

    Example:
        >>> merge_counts(10, 4, "constant"), merge_counts(16, 4, "linear")
        ([3, 3, 2, 2], [8, 6, 2, 0])
    """
    even, rest = divmod(total, blocks)
    if schedule == "constant":
        return [even + (i < rest) for i in range(blocks)]
    counts, left = [], total
    for i in range(blocks):
        counts.append(min(left, int(2 * even * (1 - i / blocks))))
        left -= counts[-1]
    return counts if schedule == "linear" else counts[::-1]


@register
@dataclass(frozen=True)
class DyMU(Method):
    """Dynamic token merging (DToMe) in the tower and virtual token unmerging (VTU) in the LLM.

    "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs" (arXiv 2504.17040). As in ToMe, every second token
    finds the most similar of the others by its keys; pairs above the threshold of their block are merged, half of the
    tokens at most, so simple images keep fewer tokens. In the LLM merged tokens attend at all their places
    (`vtc.patch(..., unmerge=False)` turns that off), which saves compute and no KV cache.

    Thresholds belong to one checkpoint of a vision tower: `vtc calibrate dymu --keep 64` finds those that keep so many
    tokens on average, and the number of tokens is theirs to decide, so a budget beside them is an error. Without
    thresholds each image is calibrated on itself: block by block as many pairs merge as lead to the budget, the same
    number for every image.

    The published code divides by (size + 1e-4) where several crops make a batch; here every mean divides by the size.

    Args:
        thresholds: one cosine per block, from the first on; blocks behind the last one merge nothing.
        calibration: instead, a model card that has thresholds (scenes-llava, the embedded model), or the path of a file
            that `vtc calibrate dymu` wrote.
        first: the first block that merges (0-based).
        schedule: without thresholds, how the merges spread over the blocks: "constant" (the paper's), "linear"
            (falling) or "reverse_linear".
        proportional: add log(size) to later attention logits; needs eager or sdpa attention in the tower.
    """

    slug = "dymu"
    paper = Paper("DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", "2504.17040")
    steps = (
        "every second token, and those of the rest below the block's threshold",
        "the most similar key",
        "mean by size; in the LLM at all places",
    )
    fidelity = "golden"
    headline = (
        "LLaVA-1.5-7B, thresholds that leave 89 of 576 tokens on average behind the tower: 97.5 % of the full model's "
        "average over 9 benchmarks; table 2 of the paper"
    )
    requires = "thresholds of the checkpoint's tower, or a budget"
    tags = frozenset({"adaptive", "merges"})
    unmerges = True
    at = "first"

    thresholds: Annotated[tuple[float, ...], Within("[-1, 1]", "cosines")] = ()
    calibration: str = ""
    first: Count = 0
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds and self.calibration:
            raise SpecError("method 'dymu' has thresholds and a calibration. Leave out one of them.")
        if self.found() and self.budget is not None:
            raise SpecError(
                f"method 'dymu' has thresholds and the budget {self.budget}, but the thresholds decide how many tokens "
                "stay. Leave out one of them."
            )

    def found(self) -> tuple[float, ...]:
        """The thresholds, given or calibrated; (): none.

        Raises:
            SpecError: there is no such calibration.
        """
        return tuple(stored_options(self.slug, self.calibration)["thresholds"]) if self.calibration else self.thresholds

    @property
    def wants_budget(self) -> bool:
        return not self.found()

    def stages(self) -> tuple[Stage, ...]:
        thresholds = self.found()
        if thresholds:
            return tuple(
                self._stage(_Block(threshold).filter, self.first + i, budget=Budget(tokens=1))
                for i, threshold in enumerate(thresholds)
            )
        return (self._stage(filter_to_budget, self.first, schedule=Repeat(self.pace)),)

    def pace(self, total: int, budget: int, step: int, steps: int) -> int:
        """Tokens that stay after block `step` of `steps`, without thresholds.

        No block can merge more than half, so earlier ones take what the last ones could not.
        """
        even = total - sum(merge_counts(total - budget, steps, self.schedule)[: step + 1])
        return min(even, budget << (steps - 1 - step))

    def _stage(self, filter: Any, block: int, **options: Any) -> Stage:
        signals = (Signal("keys"), Signal("sizes"))
        site = Site("tower", block)
        return Stage(site, filter, links, merge, signals, leave=Weigh() if self.proportional else Drop(), **options)


@dataclass(frozen=True)
class ThresholdFinder(Method):
    """Finds the thresholds of DyMU while batches of images pass the tower.

    The best pairs of a whole batch are merged, `merge_counts` of them per image on average, and the threshold of the
    block is the similarity of the best pair that is not (0 where that is negative); `thresholds` are the means over the
    batches so far. Later blocks see what earlier ones merged.

    Args:
        total: tokens merged per image, over all blocks.
        blocks: blocks that merge, from the first on.
        schedule: as in DyMU.
    """

    slug = "dymu-calibration"
    tags = frozenset({"adaptive", "merges"})

    total: int = 0
    blocks: int = 1
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "constant"
    seen: dict[int, list[float]] = field(default_factory=dict, compare=False)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One per block."""
        return tuple(sum(values) / len(values) for _, values in sorted(self.seen.items()))

    def stages(self) -> tuple[Stage, ...]:
        counts = merge_counts(self.total, self.blocks, self.schedule)
        signals = (Signal("keys"), Signal("sizes"))
        return tuple(
            Stage(
                Site("tower", i),
                _Batch(count, self.seen.setdefault(i, [])).filter,
                links,
                merge,
                signals,
                budget=Budget(tokens=1),
                leave=Weigh(),
            )
            for i, count in enumerate(counts)
        )


@dataclass(frozen=True)
class _Block:
    threshold: float

    def filter(self, tokens: Tokens) -> Tensor:
        """Pairs above the threshold merge; the number depends on the image, so this waits for the device."""
        value = similarity(tokens)
        return bipartite_keep(tokens, value, half_at_most(tokens, (value > self.threshold).sum(dim=1).tolist()))


@dataclass(frozen=True)
class _Batch:
    count: int
    found: list[float]

    def filter(self, tokens: Tokens) -> Tensor:
        """The best pairs of the whole batch merge; the best of the others is noted."""
        value = similarity(tokens)
        ordered = value.flatten().sort(descending=True, stable=True)
        pairs = int(value.isfinite().sum())  # the others have no partner
        edges = min(self.count * len(value), pairs, value.numel() - 1)
        self.found.append(max(0.0, float(ordered.values[edges])))
        group = ordered.indices[:edges] // value.shape[1]
        return bipartite_keep(tokens, value, group.bincount(minlength=len(value)).tolist())


def filter_to_budget(tokens: Tokens) -> Tensor:
    """As many pairs merge as lead to the budget, half of the tokens at most."""
    wanted = [max(0, n - k) for n, k in zip(tokens.lengths, tokens.budget, strict=True)]
    return bipartite_keep(tokens, similarity(tokens), half_at_most(tokens, wanted))


def similarity(tokens: Tokens) -> Tensor:
    """[B, S] cosine of every even token with its best odd one, by the keys (mean over heads)."""
    metric = tokens.signal("keys").float().mean(dim=1)
    return bipartite_match(metric, num_protected=tokens.num_prefix, mask=tokens.mask)[0]


def half_at_most(tokens: Tokens, counts: list[int]) -> list[int]:
    """No more merges than half of the tokens of each group."""
    return [min(count, n // 2) for count, n in zip(counts, tokens.lengths, strict=True)]


def links(tokens: Tokens, keep: Tensor) -> Links:
    """Each merged token goes to the odd one with the most similar keys."""
    settled, keep = settle(tokens, keep)
    return bipartite_links(tokens, tokens.signal("keys").float().mean(dim=1), keep, settled.budget)


def merge(tokens: Tokens, keep: Tensor, links: Links | None) -> TokenMap:
    """Means by size."""
    settled, keep = settle(tokens, keep)
    return size_weighted_merge(settled, keep, links)
