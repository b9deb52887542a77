"""TokenMap against its definition: a dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from vtc import TokenMap


@st.composite
def maps(draw, inputs=None):
    """Random ragged maps: selections and merges, with tokens that go to several slots or to none.

    `inputs` are the valid tokens of each group; a map reads no others.
    """
    inputs = inputs or [draw(st.integers(1, 7))] * draw(st.integers(1, 3))
    batch, num_tokens = len(inputs), max(inputs)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = [draw(st.integers(1, n)) for n in inputs]
    width = max(lengths)
    anchor = torch.full((batch, width), -1)
    for b, n in enumerate(lengths):
        anchor[b, :n] = torch.randperm(inputs[b], generator=generator)[:n].sort().values
    if draw(st.booleans()):
        return TokenMap.select(anchor, num_tokens, lengths)
    edges = draw(st.integers(1, 9))
    source = torch.stack([torch.randint(0, n, (edges,), generator=generator) for n in inputs])
    slot = torch.stack([torch.randint(-1, n, (edges,), generator=generator) for n in lengths])
    weight = torch.rand(batch, edges, generator=generator)
    return TokenMap(anchor, tuple(lengths), num_tokens, source, slot, weight)


@given(maps(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_apply_is_the_matrix(token_map, seed):
    x = torch.randn(len(token_map.lengths), token_map.num_tokens, 3, generator=torch.Generator().manual_seed(seed))
    expected = token_map.matrix() @ x
    torch.testing.assert_close(token_map.apply(x), expected, rtol=1e-5, atol=1e-5)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_then_is_the_product(data):
    first = data.draw(maps())
    second = data.draw(maps(inputs=first.lengths))
    both = first.then(second)
    torch.testing.assert_close(both.matrix(), second.matrix() @ first.matrix(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.matrix(mass=True), second.matrix(mass=True) @ first.matrix(mass=True))
    assert both.lengths == second.lengths
    assert both.num_tokens == first.num_tokens


@given(maps())
@settings(max_examples=60, deadline=None)
def test_sizes_count_each_merged_token_once(token_map):
    mass = token_map.matrix(mass=True)
    torch.testing.assert_close(token_map.sizes(), mass.sum(2))
    per_token = mass.sum(1)
    assert ((per_token - 1).abs().lt(1e-5) | per_token.eq(0)).all()


@given(maps())
@settings(max_examples=40, deadline=None)
def test_raster_sorts_slots_and_moves_their_edges(token_map):
    sorted_map = token_map.raster()
    for b, n in enumerate(token_map.lengths):
        order = token_map.anchor[b, :n].argsort()
        assert torch.equal(sorted_map.anchor[b, :n], token_map.anchor[b, :n][order])
        torch.testing.assert_close(sorted_map.matrix()[b, :n], token_map.matrix()[b, :n][order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_copies_bit_for_bit(dtype):
    x = torch.randn(2, 9, 5).to(dtype)
    keep = torch.tensor([[0, 3, 8], [1, 2, 7]])
    out = TokenMap.select(keep, 9).apply(x)
    assert out.dtype == dtype
    assert torch.equal(out, torch.stack([x[b, keep[b]] for b in range(2)]))


def test_identity_is_neutral():
    token_map = TokenMap.select(torch.tensor([[1, 4], [0, -1]]), 5, [2, 1])
    before = TokenMap.identity((5, 5)).then(token_map)
    after = token_map.then(TokenMap.identity((2, 1)))
    assert torch.equal(before.anchor, token_map.anchor)
    assert torch.equal(after.anchor, token_map.anchor)


def test_in_slot_order_takes_the_same_places_in_turn():
    token_map = TokenMap.select(torch.tensor([[5, 1, 3]]), 6).in_slot_order()
    assert token_map.anchor.tolist() == [[1, 3, 5]]


def test_edges_come_together():
    with pytest.raises(vtc.errors.InputError, match="come together"):
        TokenMap(torch.tensor([[0]]), (1,), 2, source=torch.tensor([[0]]))
