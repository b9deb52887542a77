"""The contract of a method, checked on drawn tokens: every registered method runs through it, and yours can too.

    from vtc.testing import check_method
    check_method(MyMethod(budget=vtc.Budget(tokens=8)))

Each check takes a method and one of its stages and raises AssertionError with what was broken. Signals are drawn from
their declared shapes, so a new signal needs no code here.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vtc.registry import from_dict
from vtc.spec import format_spec, parse
from vtc.stages import SIGNALS, Method, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout, Tokens

Check = Callable[[Method, Stage], None]

#: sizes of the axes that signals name beside the batch B and the tokens N
AXES = {"D": 48, "H": 2, "G": 2, "L": 4, "T": 6, "M": 2, "E": 10, "S": 12, "V": 9, "d": 8, "4": 4}
#: signals that cover the prefix too
WITH_PREFIX = ("keys", "queries", "sizes")
RAGGED = (30, 9, 24)
BUDGETS: tuple[int | float, ...] = (1, 6, 0.3, 0.9)


def draw_tokens(
    stage: Stage,
    lengths: Sequence[int],
    budget: int | float | Budget,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    axes: Mapping[str, int] = AXES,
) -> Tokens:
    """Random tokens of ragged groups with what `stage` reads, and garbage in the padding; `axes` as in `AXES`."""
    generator = torch.Generator().manual_seed(seed)
    names = {signal.name for signal in stage.signals}
    prefix = int("cls_hidden" in names or stage.site.name == "tower")
    names -= {"cls_hidden"}
    if any(name.startswith("text_") or name.endswith("_to_text") for name in names):
        names |= {"text_mask"}
    if "visual_embeds" in names:
        names |= {"visual_mask"}
    width = max(lengths)
    signals = {name: _draw(name, len(lengths), width, prefix, generator, dtype, axes) for name in sorted(names)}
    index = torch.arange(width).expand(len(lengths), -1)
    row = index.masked_fill(index >= torch.tensor(lengths)[:, None], -1)
    layout = Layout(row.clamp(max=0), row, row.clamp(max=0), tuple(((1, n),) for n in lengths))
    resolved = Budget.of(budget).resolve(lengths)
    if stage.site.name == "tower":
        layout = layout.map(lambda part: torch.nn.functional.pad(part, (prefix, 0), value=-1))
    x = torch.randn(len(lengths), width + prefix, axes["D"], generator=generator).to(dtype)
    return Tokens(x, tuple(lengths), layout, signals, prefix, resolved)


def check_budget(method: Method, stage: Stage) -> None:
    """As many tokens stay as the budget says (adaptive: at most), each once, in range, padding last."""
    for budget in BUDGETS:
        tokens = draw_tokens(stage, RAGGED, budget)
        token_map = stage.decide(tokens)
        for b, want in enumerate(tokens.budget):
            count, anchors = _stays(stage, tokens, token_map, b)
            exact = "adaptive" not in method.tags and getattr(method, "variant", "paper") != "reference"
            exact = exact and stage.leave != "freeze"
            assert count == want if exact else count >= _least(method, stage), f"{count} stay, the budget says {want}"
            assert sorted(set(anchors)) == sorted(anchors), f"a token stays twice: {anchors}"
            assert all(tokens.num_prefix <= a < tokens.ends[b] for a in anchors), f"out of range: {anchors}"
            assert bool((token_map.anchor[b, token_map.lengths[b] :] == -1).all()), "padding is not -1"


def check_groups(method: Method, stage: Stage) -> None:
    """A batch gives what each group gives alone, whatever stands in the padding."""
    for lengths in ((20, 20), RAGGED):
        for budget in BUDGETS:
            tokens = draw_tokens(stage, lengths, budget)
            together = stage.decide(tokens)
            features = together.apply(tokens.x)
            for b in range(len(lengths)):
                part = _alone(stage, tokens, b)
                single, n = stage.decide(part), together.lengths[b]
                assert single.lengths == (n,), f"{n} tokens stay in the batch, {single.lengths[0]} alone"
                assert torch.equal(together.anchor[b, :n], single.anchor[0, :n]), "the batch changes what stays"
                torch.testing.assert_close(features[b, :n], single.apply(part.x)[0, :n], rtol=1e-4, atol=1e-5)


def check_pure(method: Method, stage: Stage) -> None:
    """Twice the same, without touching inputs or the global random state."""
    tokens = draw_tokens(stage, RAGGED, 6)
    before = {name: value.clone() for name, value in (("x", tokens.x), *tokens.signals.items())}
    state = torch.random.get_rng_state()
    first = stage.decide(tokens)
    other = draw_tokens(stage, RAGGED, 9, seed=1)
    stage.decide(other)
    again = stage.decide(tokens)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state moved"
    for name, value in (("x", tokens.x), *tokens.signals.items()):
        assert torch.equal(value, before[name]), f"{name} was changed in place"
    assert torch.equal(first.anchor, again.anchor), "two calls differ"
    assert torch.equal(first.apply(tokens.x), again.apply(tokens.x)), "two calls differ"


def check_weights(method: Method, stage: Stage) -> None:
    """Features and sizes are finite; a method that merges nothing returns a selection."""
    tokens = draw_tokens(stage, RAGGED, 6)
    token_map = stage.decide(tokens)
    assert bool(torch.isfinite(token_map.apply(tokens.x)).all()), "features are not finite"
    sizes = token_map.sizes()
    assert bool((sizes >= 0).all()) and bool(torch.isfinite(sizes).all()), "sizes are not finite"
    assert token_map.is_selection or "merges" in method.tags, "it merges, but is not tagged 'merges'"


def check_degenerate(method: Method, stage: Stage) -> None:
    """Equal tokens, zero vectors, two tokens, and a budget one below all of them."""
    for lengths, budget in (((12, 12), 5), ((2,), 1), ((12,), 11)):
        for value in (0.0, 1.0):
            tokens = draw_tokens(stage, lengths, budget)
            signals = {k: _flat(k, v, value) for k, v in tokens.signals.items()}
            tokens = dataclasses.replace(tokens, x=torch.full_like(tokens.x, value), signals=signals)
            token_map = stage.decide(tokens)
            assert bool(torch.isfinite(token_map.apply(tokens.x)).all()), "features are not finite"
            _, anchors = _stays(stage, tokens, token_map, 0)
            assert len(set(anchors)) == len(anchors) >= _least(method, stage), f"a token stays twice: {anchors}"


def check_dtypes(method: Method, stage: Stage) -> None:
    """Half-precision tokens come back in half precision, finite."""
    for dtype in (torch.bfloat16, torch.float16):
        tokens = draw_tokens(stage, RAGGED, 6, dtype=dtype)
        features = stage.decide(tokens).apply(tokens.x)
        assert features.dtype == dtype, f"{dtype} tokens became {features.dtype}"
        assert bool(torch.isfinite(features).all()), f"features are not finite in {dtype}"


def check_equivariance(method: Method, stage: Stage) -> None:
    """Where tagged: shuffled tokens give the same set of tokens."""
    if "permutation_equivariant" not in method.tags:
        return
    tokens = draw_tokens(stage, (20,), 6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    moved = {
        name: value.index_select(_axis(name), order) if _axis(name) >= 0 else value
        for name, value in tokens.signals.items()
    }
    shuffled = dataclasses.replace(tokens, x=tokens.x[:, order], signals=moved)
    here, there = (stage.decide(t).anchor[0].tolist() for t in (tokens, shuffled))
    assert {int(order[i]) for i in there} == set(here), "the choice depends on the order of the tokens"


def check_round_trips(method: Method, stage: Stage) -> None:
    """Spec string, dict, copy and repr give the method back."""
    assert list(parse(format_spec(method))) == [method], "the spec string does not parse to the method"
    assert from_dict(method.to_dict()) == method, "the dict does not give the method back"
    assert copy.deepcopy(method) == method
    assert type(method).__name__ in repr(method)


CHECKS: tuple[Check, ...] = (
    check_budget,
    check_groups,
    check_pure,
    check_weights,
    check_degenerate,
    check_dtypes,
    check_equivariance,
    check_round_trips,
)


def check_method(method: Method) -> None:
    """Run every check on every stage of `method`; it must be registered for the round trips.

    Raises:
        AssertionError: the first broken promise, with the check's name.
    """
    for stage in method.stages():
        for check in CHECKS:
            try:
                check(method, stage)
            except AssertionError as error:
                error.add_note(f"{check.__name__} of {method.slug} at {stage.site}")
                raise


def _least(method: Method, stage: Stage) -> int:
    """Tokens of a group that stay at least: none only where all may be frozen or dropped on purpose."""
    return 0 if stage.leave == "freeze" or "drops_all" in method.tags else 1


def _stays(stage: Stage, tokens: Tokens, token_map: TokenMap, b: int) -> tuple[int, list[int]]:
    """How many visual tokens of group b stay, and which; inside the tower the prefix stays before them."""
    anchors = token_map.anchor[b, : token_map.lengths[b]].tolist()
    prefix = tokens.num_prefix if stage.site.name == "tower" else 0
    assert anchors[:prefix] == list(range(prefix)), f"the prefix does not come first: {anchors[: prefix + 1]}"
    return len(anchors) - prefix, anchors[prefix:]


def _axes(name: str) -> list[str]:
    """The axes that a signal's declaration names: "[B, H, N, d] ..." -> ["B", "H", "N", "d"]."""
    declared = {"text_mask": "[B, T] ", "visual_mask": "[B, V] "}.get(name) or SIGNALS[name]
    match = re.match(r"\[([^\]]+)\]", declared)
    assert match is not None, f"signal {name!r} does not declare its shape"
    return [axis.strip() for axis in match.group(1).split(",")]


def _axis(name: str) -> int:
    """Which axis of a signal counts the tokens; -1: none."""
    axes = _axes(name)
    return axes.index("N") if "N" in axes else -1


def _draw(
    name: str,
    batch: int,
    width: int,
    prefix: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    axes: Mapping[str, int],
) -> Tensor:
    sizes = {**AXES, **axes, "B": batch, "N": width + (prefix if name in WITH_PREFIX else 0)}
    shape = [sizes[axis] for axis in _axes(name)]
    if name == "text_mask":
        return torch.arange(sizes["T"]) < torch.arange(2, batch + 2)[:, None]
    if name in ("visual_mask", "sequence_valid"):
        return torch.ones(shape, dtype=torch.bool)
    if name == "square_grid":
        return torch.zeros(shape, dtype=torch.bool)
    if name == "sequence_row":
        return torch.arange(shape[1]).expand(shape) % sizes["S"]
    if name == "text_after":
        return torch.arange(sizes["T"]).expand(shape) >= 1
    if name.endswith("position"):
        return torch.arange(shape[1]).expand(shape) + 5
    if name == "tile":
        return torch.stack([torch.tensor([b, 0, 0, 0]) for b in range(batch)])
    if name == "sizes":
        return torch.randint(1, 5, shape, generator=generator).to(dtype)
    drawn = torch.randn(shape, generator=generator)
    return (drawn.mul(2).exp() / 500 if "attention" in name and name != "attention_output" else drawn).to(dtype)


def _flat(name: str, value: Tensor, constant: float) -> Tensor:
    """A signal with nothing to tell; masks, places and sizes stay."""
    return torch.full_like(value, constant) if value.is_floating_point() and name != "sizes" else value


def _alone(stage: Stage, tokens: Tokens, b: int) -> Tokens:
    """Group b without its padding."""
    n = tokens.lengths[b]
    signals = {}
    for name, value in tokens.signals.items():
        part = value[b : b + 1]
        axis = _axis(name)
        keep = n + (tokens.num_prefix if name in WITH_PREFIX else 0)
        signals[name] = part if axis < 0 else part.narrow(axis, 0, keep)
    if "tile" in signals:
        signals["tile"] = torch.tensor([[0, 0, 0, 0]])
    assert tokens.layout is not None
    extra = tokens.layout.row.shape[1] - max(tokens.lengths)  # inside the tower the layout covers the prefix
    layout = dataclasses.replace(tokens.layout.groups([b]).map(lambda part: part[:, : n + extra]))
    return Tokens(
        tokens.x[b : b + 1, : tokens.ends[b]], (n,), layout, signals, tokens.num_prefix, tokens.budget[b : b + 1]
    )
