"""Seats of tiles against one seat after the other."""

import pytest
import torch

from vtc.primitives import of_full, per_image, ranks, seats


def one_by_one(share, areas, full, own, total):
    """Highest averages, seat by seat: the full image's own seats, then tiles, then more of the full image."""
    counts = [min(own, area) if is_full else 0 for area, is_full in zip(areas, full, strict=True)]
    while sum(counts) < total:
        free = [g for g, area in enumerate(areas) if counts[g] < area and not full[g]]
        free = free or [g for g, area in enumerate(areas) if counts[g] < area]
        counts[max(free, key=lambda g: (share[g] + 1e-6) / (counts[g] + 0.5))] += 1
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_seats_are_given_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    full = torch.tensor([True, False, False, False, True, False, False, True])
    areas = [16, 16, 9, 12, 16, 5, 16, 16]
    mask = torch.arange(16) < torch.tensor(areas)[:, None]
    share = torch.rand(8, generator=generator) * torch.tensor([1, 1, 1, 0, 1, 1, 1, 1])
    score = torch.randn(8, 16, generator=generator)
    totals, owns = [int(torch.randint(4, 30, (), generator=generator)) for _ in range(3)], [3, 5, 16]
    totals[2] = 7
    place = ranks(score, mask)
    total, own = (torch.tensor(part)[image] for part in (totals, owns))
    own = torch.minimum(own, total)
    kept = seats(share, place, total, image, full=full, own=own, mask=mask)
    for i in range(3):
        rows = (image == i).nonzero()[:, 0].tolist()
        room = [areas[g] for g in rows]
        want = one_by_one(
            [float(share[g]) for g in rows], room, [bool(full[g]) for g in rows], int(own[rows[0]]), totals[i]
        )
        assert kept[rows].sum(1).tolist() == want
    # the best tokens of each tile, and none that is not there
    for g, n in enumerate(kept.sum(1).tolist()):
        assert place[g][kept[g]].sort().values.tolist() == list(range(n))
    assert not (kept & ~mask).any()


def test_values_of_the_image_reach_its_tiles():
    image, full = torch.tensor([1, 1, 0, 0]), torch.tensor([False, True, True, False])
    value = torch.arange(8).view(4, 2)
    assert of_full(value, image, full).tolist() == [[2, 3], [2, 3], [4, 5], [4, 5]]
    assert per_image((1, 2, 3, 4), image).tolist() == [3, 3, 7, 7]
    assert per_image(torch.tensor([0.5, 0.5, 1.0, 0.0]), image).tolist() == [1.0, 1.0, 1.0, 1.0]
