"""The contract of a method, checked on drawn tokens: every registered method runs through it, and yours can too.

    from vtc.testing import check_method
    check_method(MyMethod(budget=vtc.Budget(tokens=8)))

Each check takes a method and one of its stages and raises AssertionError with what was broken. Signals are drawn as
`vtc.signals` declares them, so a new signal needs no code here.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vtc.catalogue.registry import from_dict
from vtc.signals import SIGNALS, read_at
from vtc.spec import format_spec, parse
from vtc.stages import Method, Stage
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout, Tokens

Check = Callable[[Method, Stage], None]

#: sizes of the axes that signals name beside the batch B and the tokens N
AXES = {"D": 48, "H": 2, "G": 2, "L": 4, "T": 6, "M": 2, "E": 10, "S": 12, "V": 9, "d": 8}
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
    names = read_at(stage.site.name, tuple(signal.name for signal in stage.signals))
    apart = sorted(name for name in names if SIGNALS[name].draw != "prefix")
    prefix = int(len(apart) < len(names) or stage.site.name == "tower")
    width = max(lengths)
    sizes = {**AXES, **axes, "B": len(lengths), "N": width}
    signals = {name: _draw(name, sizes, prefix, generator, dtype) for name in apart}
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
            exact = exact and not stage.freezes
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
        name: value if SIGNALS[name].axis < 0 else value.index_select(SIGNALS[name].axis, order)
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
    return 0 if stage.freezes or "drops_all" in method.tags else 1


def _stays(stage: Stage, tokens: Tokens, token_map: TokenMap, b: int) -> tuple[int, list[int]]:
    """How many visual tokens of group b stay, and which; inside the tower the prefix stays before them."""
    anchors = token_map.anchor[b, : token_map.lengths[b]].tolist()
    prefix = tokens.num_prefix if stage.site.name == "tower" else 0
    assert anchors[:prefix] == list(range(prefix)), f"the prefix does not come first: {anchors[: prefix + 1]}"
    return len(anchors) - prefix, anchors[prefix:]


def _draw(name: str, sizes: Mapping[str, int], prefix: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random signal; `sizes` of the axes by letter, without the prefix."""
    kind = SIGNALS[name]
    sizes = {**sizes, "N": sizes["N"] + prefix * kind.prefix}
    shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in kind.axes]
    number = torch.arange(shape[-1]).expand(shape)
    match kind.draw:
        case "normal":
            return torch.randn(shape, generator=generator).to(dtype)
        case "probability":
            return (torch.randn(shape, generator=generator).mul(2).exp() / 500).to(dtype)
        case "count":
            return torch.randint(1, 5, shape, generator=generator).to(dtype)
        case "place":
            return number + 5
        case "row":
            return number % sizes["S"]
        case "valid":
            return number < torch.arange(2, shape[0] + 2)[:, None]
        case "behind":
            return number >= 1
        case "all":
            return torch.ones(shape, dtype=torch.bool)
        case "none":
            return torch.zeros(shape, dtype=torch.bool)
        case "tile":
            return torch.tensor([[image, 0, 0, 0] for image in range(shape[0])])
        case "prefix":
            raise AssertionError(f"{name} is a token of x")


def _flat(name: str, value: Tensor, constant: float) -> Tensor:
    """A signal with nothing to tell; masks, places and sizes stay."""
    return torch.full_like(value, constant) if SIGNALS[name].draw in ("normal", "probability") else value


def _alone(stage: Stage, tokens: Tokens, b: int) -> Tokens:
    """Group b without its padding."""
    n = tokens.lengths[b]
    signals = {}
    for name, value in tokens.signals.items():
        kind, part = SIGNALS[name], value[b : b + 1]
        if kind.draw == "tile":
            part = value[:1]
        keep = n + tokens.num_prefix * kind.prefix
        signals[name] = part if kind.axis < 0 else part.narrow(kind.axis, 0, keep)
    assert tokens.layout is not None
    extra = tokens.layout.row.shape[1] - max(tokens.lengths)  # inside the tower the layout covers the prefix
    layout = dataclasses.replace(tokens.layout.groups([b]).map(lambda part: part[:, : n + extra]))
    return Tokens(
        tokens.x[b : b + 1, : tokens.ends[b]], (n,), layout, signals, tokens.num_prefix, tokens.budget[b : b + 1]
    )
