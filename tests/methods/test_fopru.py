"""FoPru's two strategies as its abstract describes them; there is no published code."""

import pytest
import torch

import vtc
from vtc.tokens import Layout


def tokens_of(score, grid, budget, segments=1):
    score = torch.as_tensor(score).float().reshape(1, -1)
    layout = Layout.grid(*grid, segments=segments)
    return vtc.Tokens.of(
        torch.zeros(1, score.shape[1], 2), budget, layout, received_attention=score, cls_attention=-score
    )


def test_rank_takes_the_best_tokens_in_raster_order():
    tokens = tokens_of([0.1, 0.4, 0.2, 0.3], (2, 2), 2)
    assert vtc.create("fopru").filter(tokens).tolist() == [[1, 3]]
    assert vtc.create("fopru", score="cls").filter(tokens).tolist() == [[0, 2]]


def test_row_takes_whole_rows_by_their_mean():
    # the best token lies in row 0, the best rows are 1 and 3
    score = [[9, 0, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0], [2, 3, 3, 3]]
    method = vtc.create("fopru", strategy="row")
    assert method.filter(tokens_of(score, (4, 4), 8)).tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]]
    # the last row is cut to its best tokens
    assert method.filter(tokens_of(score, (4, 4), 9)).tolist() == [[0, 4, 5, 6, 7, 12, 13, 14, 15]]
    assert method.filter(tokens_of(score, (4, 4), 6)).tolist() == [[4, 5, 6, 7, 13, 14]]


def test_rows_of_all_crops_compete():
    score = [[5, 5], [1, 1], [2, 2], [4, 4]]  # two crops of 2 x 2
    method = vtc.create("fopru", strategy="row")
    assert method.filter(tokens_of(score, (2, 2), 4, segments=2)).tolist() == [[0, 1, 6, 7]]


def test_separators_are_in_no_row():
    layout = Layout.grid(2, 3)
    row = layout.row.clone()
    row[:, 2::3] = -1
    layout = Layout(row, layout.col, layout.segment, layout.grids)
    score = torch.tensor([[1.0, 1.0, 9.0, 2.0, 2.0, 9.0]])
    tokens = vtc.Tokens.of(torch.zeros(1, 6, 2), 4, layout, received_attention=score)
    assert vtc.create("fopru", strategy="row").filter(tokens).tolist() == [[0, 1, 3, 4]]


def test_row_needs_a_grid():
    tokens = vtc.Tokens.of(torch.zeros(1, 4, 2), 2, received_attention=torch.rand(1, 4))
    with pytest.raises(vtc.VTCError, match="grid"):
        vtc.create("fopru", strategy="row").filter(tokens)
