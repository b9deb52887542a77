"""G-Prune against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

CASES = golden_cases("g-prune", Path(__file__).parents[1] / "golden")


def packed_layout(base, rows, cols):
    """A thumbnail of `base` tokens, then a packed grid that has a newline behind each row."""
    side = int(base**0.5)
    first = Layout.grid(side, base // side)
    row = torch.arange(rows)[:, None].expand(rows, cols + 1).clone()
    col = torch.arange(cols + 1).expand(rows, -1).clone()
    segment = torch.ones(rows, cols + 1, dtype=torch.long)
    for part in (row, col, segment):
        part[:, -1] = -1
    parts = [
        torch.cat([a, b.flatten()[None]], dim=1)
        for a, b in zip((first.row, first.col, first.segment), (row, col, segment), strict=True)
    ]
    return Layout(*parts, grids=(((side, base // side), (rows, cols)),))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    x, rows, cols = case["in_tokens"][None], case.number("param_rows"), case.number("param_cols")
    base, ratio = x.shape[1] - rows * (cols + 1), case.number("param_keep_ratio")
    budget = int(ratio * base) + int(ratio * rows * cols) + rows
    method = vtc.create(
        "g-prune",
        similarity=case.number("param_similarity"),
        temperature=case.number("param_temperature"),
        iterations=case.number("param_iterate_num"),
    )
    tokens = vtc.Tokens.of(x, budget, packed_layout(base, rows, cols))
    _, degree, score = method.graph_scores(tokens)
    for segment, (name, count) in enumerate((("base", base), ("hr", rows * cols))):
        assert torch.equal(degree[segment, :count].long(), case[f"out_degree_{name}"])
        torch.testing.assert_close(score[segment, :count], case[f"out_score_{name}"], atol=1e-5, rtol=1e-5)
    token_map = method.stages()[0].decide(tokens)
    assert torch.equal(token_map.anchor[0], case["out_keep_idx"])
    torch.testing.assert_close(token_map.apply(x)[0], case["out_tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "cols", "ratio"), [(10, 9, 0.5), (24, 36, 0.3), (48, 48, 0.11), (5, 31, 0.7)])
def test_segments_keep_their_rounded_share(rows, cols, ratio):
    base = 576
    x = torch.randn(1, base + rows * (cols + 1), 4, generator=torch.Generator().manual_seed(0))
    shares = [int(ratio * base), int(ratio * rows * cols), rows]
    layout = packed_layout(base, rows, cols)
    keep = vtc.create("g-prune").filter(vtc.Tokens.of(x, sum(shares), layout))
    segment = layout.take(keep).segment
    assert [int((segment == s).sum()) for s in (0, 1, -1)] == shares


def test_without_layout_one_graph():
    x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    flat = vtc.create("g-prune").filter(vtc.Tokens.of(x, 5))
    assert torch.equal(flat, vtc.create("g-prune").filter(vtc.Tokens.of(x, 5, Layout.grid(4, 4, groups=2))))


def test_zero_vectors_and_more_newlines_than_budget():
    layout = packed_layout(16, 6, 2)
    keep = vtc.create("g-prune").filter(vtc.Tokens.of(torch.zeros(1, 34, 4), 4, layout))
    assert keep.tolist() == [[18, 21, 24, 27]]


def test_crops_share_a_graph_and_frames_do_not():
    """The same tokens as a thumbnail and two crops: the crops are one graph, unless each segment is asked for."""
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    crops, frames = Layout.grid(2, 2, groups=2, segments=3), Layout.grid(1, 4, groups=2, segments=3)
    places, _, joined = vtc.create("g-prune").graph_scores(vtc.Tokens.of(x, 6, crops))
    assert [(row[row >= 0] % 12).tolist() for row in places] == [[0, 1, 2, 3], list(range(4, 12))] * 2
    whole = vtc.create("g-prune").graph_scores(vtc.Tokens.of(x[:, 4:], 4))[2]
    torch.testing.assert_close(joined[1::2], whole)
    places, _, apart = vtc.create("g-prune", graphs="segment").graph_scores(vtc.Tokens.of(x, 6, frames))
    assert places.shape == (6, 4)
    single = vtc.create("g-prune").graph_scores(vtc.Tokens.of(x.reshape(6, 4, 4), 2))[2]
    torch.testing.assert_close(apart, single)
