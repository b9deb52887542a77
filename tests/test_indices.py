"""Index arithmetic against loops over plain lists."""

import pytest
import torch

from vtc.indices import compact, follow, invert, mark, put, shift, take, take_positions

INDEX = torch.tensor([[2, -1, 0], [-1, -1, 1]])


def test_follow():
    table = torch.tensor([[4, 5, 6], [7, 8, 9]])
    expected = [[-1 if i < 0 else table[b, i].item() for i in row] for b, row in enumerate(INDEX.tolist())]
    assert follow(table, INDEX).tolist() == expected
    assert follow(None, INDEX) is INDEX


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3), 1), ((2, 3, 4), 1), ((2, 5, 3), 2), ((2, 5, 3, 4), 2), ((1, 3, 4), 1)]
)
def test_take_reads_along_any_axis(shape, dim):
    x = torch.rand(shape)
    given = take(x, INDEX, dim)
    assert given.shape == (2, *shape[1:dim], 3, *shape[dim + 1 :])
    for b, row in enumerate(INDEX.tolist()):
        for r, i in enumerate(row):
            sample = x[b if shape[0] > 1 else 0]
            assert torch.equal(given[b].select(dim - 1, r), sample.select(dim - 1, max(i, 0)))


@pytest.mark.parametrize("axes", [(), (3,)])
@pytest.mark.parametrize("batch", [1, 2])
def test_take_positions(axes, batch):
    positions = torch.randint(0, 100, (*axes, batch, 3))
    given = take_positions(positions, INDEX)
    assert given.shape == (*axes, 2, 3)
    for b, row in enumerate(INDEX.tolist()):
        assert torch.equal(given[..., b, :], positions[..., b % batch, :][..., [max(i, 0) for i in row]])


def test_put_writes_nothing_at_padding():
    x, values = torch.zeros(2, 3, 4), torch.rand(2, 3, 4) + 1
    written = put(x, INDEX, values)
    assert torch.equal(written[0, 2], values[0, 0])
    assert torch.equal(written[0, 0], values[0, 2])
    assert torch.equal(written[1, 1], values[1, 2])
    assert not written[0, 1].any()
    assert not written[1, [0, 2]].any()
    assert not x.any()


def test_shift():
    assert shift(INDEX, 5).tolist() == [[7, -1, 5], [-1, -1, 6]]
    assert shift(INDEX, torch.tensor([[1], [2]])).tolist() == [[3, -1, 1], [-1, -1, 3]]


def test_mark():
    assert mark(INDEX, 4).tolist() == [[True, False, True, False], [False, True, False, False]]


def test_compact_and_invert_are_each_others_way_back():
    keep = torch.rand(5, 9) < 0.5
    keep[0] = True
    column = compact(keep, keep.sum(1).tolist())
    for b, row in enumerate(column.tolist()):
        assert [i for i in row if i >= 0] == [i for i, kept in enumerate(keep[b].tolist()) if kept]
        assert row == sorted(row), "padding stands on the left"
    assert torch.equal(mark(column, 9), keep)
    row_of = invert(column, 9)
    assert torch.equal(row_of >= 0, keep)
    assert torch.equal(follow(row_of, column), torch.where(column < 0, -1, torch.arange(column.shape[1])))
