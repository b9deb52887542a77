"""Budgets, layouts and tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtc import Budget, Layout, Tokens
from vtc.engine.llm.visual import budgets
from vtc.errors import BudgetError, InputError, SignalUnavailableError


@given(st.integers(1, 700), st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_token_budgets_are_met_or_keep_all(tokens, lengths):
    assert Budget(tokens=tokens).resolve(lengths) == tuple(min(tokens, n) for n in lengths)


@given(st.floats(0.001, 1.0), st.integers(1, 600))
def test_ratio_budgets_round_like_python(ratio, length):
    (kept,) = Budget(ratio=ratio).resolve([length])
    assert kept == min(length, max(1, round(ratio * length)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (64, Budget(tokens=64)),
        (0.25, Budget(ratio=0.25)),
        ("64", Budget(tokens=64)),
        ("0.25", Budget(ratio=0.25)),
        ("25%", Budget(ratio=0.25)),
        (Budget(tokens=3), Budget(tokens=3)),
    ],
)
def test_budget_of(value, expected):
    assert Budget.of(value) == expected


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, "no", "-3", "150%", True])
def test_bad_budgets(value):
    with pytest.raises(BudgetError):
        Budget.of(value)


def test_budget_needs_exactly_one_number_and_a_known_unit():
    with pytest.raises(BudgetError, match="exactly one"):
        Budget()
    with pytest.raises(BudgetError, match="exactly one"):
        Budget(tokens=3, ratio=0.5)
    with pytest.raises(BudgetError, match="per='page'"):
        Budget(tokens=3, per="page")


def test_budgets_per_unit():
    layout = Layout.grid(2, 2, groups=2, segments=3)
    origin, lengths = ((12,), (12,)), (12, 12)
    assert budgets(Budget(tokens=5), origin, lengths, layout, (0, 0)) == (5, 5)
    assert budgets(Budget(tokens=2, per="tile"), origin, lengths, layout, (0, 0)) == (6, 6)
    assert budgets(Budget(tokens=5, per="sample"), origin, lengths, layout, (0, 0)) == (3, 2)
    assert budgets(Budget(tokens=5, per="sample"), origin, lengths, layout, (0, 1)) == (5, 5)
    assert budgets(Budget(tokens=5), ((12, 12),), (24,), layout, (0,)) == (10,)
    assert budgets(Budget(ratio=0.5), ((12, 8),), (7,), None, (0,)) == (7,)


def test_layout_grid_take_and_groups():
    layout = Layout.grid(2, 3, groups=2)
    assert layout.row[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.col[1].tolist() == [0, 1, 2, 0, 1, 2]
    taken = layout.take(torch.tensor([[4, -1], [2, 3]]))
    assert taken.row.tolist() == [[1, -1], [0, 1]]
    assert layout.groups([1]).grids == (((2, 3),),)


def test_tokens_check_their_shapes():
    with pytest.raises(InputError, match="do not fit"):
        Tokens(torch.zeros(2, 3, 4), (3,))
    with pytest.raises(InputError, match="longest group"):
        Tokens(torch.zeros(1, 3, 4), (2,))


def test_missing_signal_says_what_was_captured():
    tokens = Tokens.of(torch.zeros(1, 3, 4), 2, keys=torch.zeros(1, 2, 3, 2))
    with pytest.raises(SignalUnavailableError, match="captured: keys"):
        tokens.signal("cls_attention")
