"""Paired comparisons against independent definitions."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.eval.results.stats import mcnemar, median_difference, paired, unpaired

counts = st.integers(0, 40)


@settings(deadline=None)  # the first call imports scipy
@given(counts, counts)
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(won, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_paired_counts_what_differs():
    first, second = [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]
    found = paired(first, second)
    assert (found.lost, found.won) == (3, 1)
    assert found.difference == pytest.approx(-2 / 6)
    assert found.low <= found.difference <= found.high


def test_the_bootstrap_interval_is_that_of_resampled_questions():
    """Against all 4^4 resamples of four questions, drawn with replacement and enumerated."""
    first, second = [1, 1, 0, 1], [1, 0, 1, 0]
    changes = [b - a for a, b in zip(first, second, strict=True)]
    exact = sorted(sum(sample) / 4 for sample in itertools.product(changes, repeat=4))
    found = paired(first, second)
    # the quantiles of 10000 draws lie within one step (1/4) of those of the full distribution
    assert abs(found.low - exact[int(0.025 * len(exact))]) <= 0.25
    assert abs(found.high - exact[int(0.975 * len(exact))]) <= 0.25


def test_equal_answers_differ_by_nothing():
    found = paired([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_answers_to_different_questions_are_refused():
    with pytest.raises(ValueError, match="3 and 2 answers"):
        paired([1, 0, 1], [1, 0])


def test_newcombe_as_published():
    """The example of Newcombe 1998, table II, row (a), method 10: 56/70 against 48/80 gives 0.0524 to 0.3339."""
    found = unpaired((48, 80), (56, 70))
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    assert found.p is None


def test_difference_of_medians():
    difference, low, high = median_difference([10.0] * 5, [12.0, 12.0, 13.0, 12.0, 12.0])
    assert difference == 2.0
    assert 2.0 <= low <= high <= 3.0
