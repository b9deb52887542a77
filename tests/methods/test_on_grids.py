"""Methods that read places, tiles or thresholds, on two-dimensional grids with padding between them."""

import pytest
import torch

import vtc
from vtc.tokens import Layout

HEADS, TEXT, WIDTH, LAYERS = 2, 5, 16, 3
METHODS = [
    ("efficientvla", {}),
    ("efficientvla", {"direction": "to_text"}),
    ("flashvla", {}),
    ("flashvla", {"rank": "full"}),
    ("fopru", {}),
    ("fopru", {"strategy": "row"}),
    ("hired", {}),
    ("hired", {"variant": "reference"}),
    ("learning-free", {}),
    ("learning-free", {"rule": "top"}),
    ("mustdrop", {"threshold": 0.1}),
    ("pact", {"cutoff": 0.7}),
    ("pact", {"cutoff": 0.0, "keep": 1.0}),
    ("sparsity-meets-similarity", {"stage": "1"}),
    ("sparsity-meets-similarity", {"stage": "1", "inflection": "maxdiff2"}),
    ("sparsity-meets-similarity", {"stage": "1", "inflection": "lof"}),
    ("tokencorr", {}),
    ("tokencorr", {"threshold": 0.1, "repeats": 5}),
]
#: token dimension of each signal; those that are not named have none
AXIS = {"low_keys": 2, "layer_keys": 2, "cls_attention_layers": 2, "text_attention": 2}
PLAIN = ("tile", "text_mask")


def group(grid, budget, tiles=1, seed=0, num_prefix=0):
    """One group with every signal that these methods read."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * tiles

    def draw(*shape):
        return torch.randn(1, *shape, generator=generator)

    layers = draw(LAYERS, n).mul(2).softmax(-1)
    signals = {
        "cls_attention": layers[:, -1],
        "cls_attention_layers": layers,
        "received_attention": draw(n).softmax(-1),
        "low_keys": draw(HEADS, n, WIDTH),
        "tile": torch.zeros(1, 4, dtype=torch.long),
        "global_attention": draw(n).softmax(-1),
        "layer_keys": draw(HEADS, n, WIDTH),
        "attention_output": draw(n, 3) @ draw(3, WIDTH) + 0.1 * draw(n, WIDTH),
        "text_attention": draw(TEXT, n).softmax(-1),
        "attention_to_text": draw(n, TEXT).softmax(-1),
        "text_mask": torch.arange(TEXT)[None] < 4,
    }
    return vtc.Tokens.of(draw(n, WIDTH), budget, Layout.grid(*grid, segments=tiles), **signals)


def batch(parts):
    """The groups of `parts` side by side, padded with numbers that must not matter."""
    width = max(part.x.shape[1] for part in parts)

    def join(tensors, axis, fill):
        padded = []
        for tensor in tensors:
            shape = list(tensor.shape)
            shape[axis] = width - shape[axis]
            padded.append(torch.cat([tensor, tensor.new_full(shape, fill)], dim=axis))
        return torch.cat(padded)

    signals = {}
    for name in parts[0].signals:
        values = [part.signals[name] for part in parts]
        signals[name] = torch.cat(values) if name in PLAIN else join(values, AXIS.get(name, 1), 0.9)
    signals["tile"][:, 0] = torch.arange(len(parts))  # each group is an image of its own
    layout = Layout(
        *(join([getattr(part.layout, name) for part in parts], 1, -1) for name in ("row", "col", "segment")),
        grids=tuple(part.layout.grids[0] for part in parts),
    )
    lengths = tuple(part.lengths[0] for part in parts)
    budget = tuple(part.budget[0] for part in parts)
    return vtc.Tokens(join([part.x for part in parts], 1, 7.0), lengths, layout, signals, budget=budget)


def name_of(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "default"


@pytest.mark.parametrize(("slug", "options"), METHODS, ids=name_of)
def test_a_batch_of_groups_is_each_group_alone(slug, options):
    stage = vtc.create(slug, **options).stages()[0]
    parts = [group((6, 6), 12), group((4, 6), 7, seed=1), group((6, 6), 3, seed=2), group((3, 3), 8, tiles=3, seed=3)]
    together = batch(parts)
    joined = stage.decide(together)
    merged = joined.apply(together.x)
    for i, part in enumerate(parts):
        alone = stage.decide(part)
        n = alone.lengths[0]
        assert joined.lengths[i] == n
        assert torch.equal(joined.anchor[i, :n], alone.anchor[0, :n])
        assert (joined.anchor[i, n:] == -1).all()
        torch.testing.assert_close(merged[i, :n], alone.apply(part.x)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(joined.sizes()[i, :n], alone.sizes()[0])


@pytest.mark.parametrize("budget", [1, 2, 5, 13, 26, 27])
@pytest.mark.parametrize(("slug", "options"), METHODS, ids=name_of)
def test_budget_order_and_repetition(slug, options, budget):
    method = vtc.create(slug, **options)
    tokens = group((3, 3), budget, tiles=3, seed=4)
    before = {name: value.clone() for name, value in {"x": tokens.x, **tokens.signals}.items()}
    token_map = method.stages()[0].decide(tokens)
    (n,) = token_map.lengths
    keep = token_map.anchor[0, :n].tolist()
    assert keep == sorted(set(keep))
    assert all(0 <= k < 27 for k in keep)
    if "adaptive" in method.tags:
        assert 1 <= n <= budget
    else:
        assert n == budget
    assert torch.isfinite(token_map.apply(tokens.x)).all()
    again = method.stages()[0].decide(tokens)
    assert torch.equal(again.anchor, token_map.anchor)
    assert torch.equal(again.apply(tokens.x), token_map.apply(tokens.x))
    assert all(torch.equal(value, before[name]) for name, value in {"x": tokens.x, **tokens.signals}.items())


@pytest.mark.parametrize(("slug", "options"), METHODS, ids=name_of)
def test_equal_tokens_and_zero_vectors_are_finite(slug, options):
    tokens = group((6, 6), 10)
    for value in (0.0, 1.0):
        flat = {
            name: signal if signal.dtype != torch.float32 else torch.full_like(signal, value)
            for name, signal in tokens.signals.items()
        }
        x = torch.full_like(tokens.x, value)
        token_map = vtc.create(slug, **options).stages()[0].decide(vtc.Tokens.of(x, 10, tokens.layout, **flat))
        assert torch.isfinite(token_map.apply(x)).all()
        assert token_map.lengths[0] <= 10


@pytest.mark.parametrize(("slug", "options"), METHODS, ids=name_of)
def test_declared_signals_are_enough(slug, options):
    method = vtc.create(slug, **options)
    tokens = group((3, 3), 8, tiles=3)
    (stage,) = method.stages()
    names = {signal.name for signal in stage.signals}
    names |= {"text_mask"} if any("text" in name for name in names) else set()
    few = {name: value for name, value in tokens.signals.items() if name in names}
    stage.decide(vtc.Tokens.of(tokens.x, 8, tokens.layout, **few))
