"""Index sets and merge rules against slow definitions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from vtc.primitives import (
    add_mean,
    ascending,
    assign_nearest,
    canvas_order,
    grid_cells,
    join_keep,
    mean_merge,
    pool_units,
    rest_of,
    self_preserving_merge,
    topk_keep,
    uniform_keep,
)
from vtc.stages import Links


@given(st.integers(1, 3), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_topk_keep(batch, width, data):
    # few distinct values, so that ties are the rule
    score = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=batch, max_size=batch))
    )
    lengths = [data.draw(st.integers(1, width)) for _ in range(batch)]
    budget = [data.draw(st.integers(1, n)) for n in lengths]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    keep = topk_keep(score.float(), budget, mask=mask)
    for b in range(batch):
        best = sorted(range(lengths[b]), key=lambda i: (-int(score[b, i]), i))[: budget[b]]
        assert [i for i in keep[b].tolist() if i >= 0] == sorted(best)
        assert keep[b, budget[b] :].eq(-1).all()


def test_topk_keep_protects():
    keep = topk_keep(torch.tensor([[3.0, 1.0, 2.0]]), [2], protect=torch.tensor([[False, True, False]]))
    assert keep.tolist() == [[0, 1]]


@given(st.integers(2, 9), st.data())
@settings(deadline=None)
def test_rest_of_is_the_complement(width, data):
    keep = sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1)))
    rest = rest_of(torch.tensor([keep]), [width], [len(keep)], width)
    assert rest.tolist() == [[i for i in range(width) if i not in keep]]


def test_ascending_and_join_keep_move_padding_to_the_end():
    assert ascending(torch.tensor([[4, -1, 0]])).tolist() == [[0, 4, -1]]
    assert join_keep(torch.tensor([[2, -1]]), torch.tensor([[1, 3]])).tolist() == [[2, 1, 3, -1]]


@given(st.integers(1, 8), st.integers(1, 8), st.data())
@settings(deadline=None)
def test_cells_are_a_partition_with_their_middle_inside(height, width, data):
    budget = data.draw(st.integers(1, height * width))
    tokens = vtc.Tokens.of(torch.zeros(1, height * width, 1), budget, vtc.Layout.grid(height, width))
    middle, cell = grid_cells(tokens)
    assert len(set(middle[0].tolist())) == budget
    assert torch.equal(cell[0, middle[0]], torch.arange(budget))
    assert set(cell[0].tolist()) == set(range(budget))
    assert torch.equal(uniform_keep(tokens), middle)


def tokens_and_links(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 6, 3, generator=generator)
    keep = torch.tensor([[0, 4], [1, 5]])
    source = torch.tensor([[1, 2, 3], [0, 2, 3]])
    slot = torch.tensor([[0, 1, 1], [1, -1, 1]])
    weight = torch.rand(2, 3, generator=generator) * (slot >= 0)
    return vtc.Tokens.of(x, 2), keep, Links(source, slot, weight)


def test_merge_rules_are_their_formulas():
    tokens, keep, links = tokens_and_links(0)
    kept = self_preserving_merge(tokens, keep, links).apply(tokens.x)
    whole = links._replace(weight=(links.slot >= 0).float())
    mean = mean_merge(tokens, keep, whole).apply(tokens.x)
    added = add_mean(tokens, keep, whole).apply(tokens.x)
    for b in range(2):
        for k in range(2):
            target = tokens.x[b, keep[b, k]]
            members = [e for e in range(3) if links.slot[b, e] == k]
            alpha = links.weight[b, members]
            sources = tokens.x[b, links.source[b, members]]
            torch.testing.assert_close(kept[b, k], (target + alpha @ sources) / (1 + alpha.sum()))
            torch.testing.assert_close(mean[b, k], torch.cat([target[None], sources]).mean(0))
            torch.testing.assert_close(added[b, k], target + (sources.mean(0) if members else 0.0))


def test_assign_nearest_takes_the_most_similar_target():
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 2.0]]])
    links = assign_nearest(metric, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
    assert links.slot.tolist() == [[0, 1]]
    only_first = assign_nearest(
        metric, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), targets=torch.tensor([[True, False]])
    )
    assert only_first.slot.tolist() == [[0, 0]]


def test_canvas_order_reads_crops_as_one_image():
    keep = torch.tensor([[0, 3], [1, 2]])  # two crops of 2 x 2 side by side
    # image rows: crop 0 (0, .), crop 1 (., 1) / crop 0 (., 3), crop 1 (2, .)
    assert canvas_order(keep, (1, 2), side=2).tolist() == [0, 2, 1, 3]
    assert pool_units(torch.arange(8.0), 4).tolist() == [1.5, 5.5]
