"""HiRED against the authors' code, and the allocation that the paper describes."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

FOLDER = Path(__file__).parents[1] / "golden"
CASES = golden_cases("hired", FOLDER, kind="next_")
TILE = 32  # pixels; the recorded geometry
PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))


def image_tokens(low, top, grid, budget, shape=(0, 0), image=0):
    """The tiles of an image as groups; attention is [tiles, heads, N], `shape` its height and width in tiles."""
    tiles, n = low.shape[0], low.shape[2]
    layers = torch.stack([low.mean(1), top.mean(1)], dim=1)
    tile = torch.tensor([[image, number, *shape] for number in range(tiles)])
    return vtc.Tokens(
        torch.zeros(tiles, n, 4),
        (n,) * tiles,
        Layout.grid(*grid, groups=tiles),
        {"cls_attention": layers[:, 1], "cls_attention_layers": layers, "tile": tile},
        budget=tuple(budget // tiles + (number < budget % tiles) for number in range(tiles)),
    )


def flat(token_map, n):
    """Kept tokens, counted through all tiles."""
    return [g * n + place for g, row in enumerate(token_map.anchor.tolist()) for place in row if place >= 0]


def counts(tokens, **options):
    return vtc.create("hired", **options).stages()[0].decide(tokens).lengths


def best_grid(size):
    """Tiles along height and width of the pinpoint that keeps most of the image and wastes least."""

    def fit(point):
        scale = min(point[1] / size[1], point[0] / size[0])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -(point[0] * point[1] - kept)

    height, width = max(PINPOINTS, key=fit)
    return height // TILE, width // TILE


def pack(features, mask, grid, size):
    """The recorded order: the full image, then the tiles on a canvas whose height and width are swapped."""
    width, height = best_grid(size)  # swapped, as published
    rows, columns = grid

    def canvas(x):
        x = x[1:].unflatten(0, (height, width)).unflatten(2, (rows, columns))
        return x.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)

    x, kept = canvas(features), canvas(mask[..., None])[..., 0]
    have = kept.shape
    if size[1] / size[0] > have[1] / have[0]:
        cut = (have[0] - int(size[0] * (have[1] / size[1]))) // 2
        x, kept = x[cut : have[0] - cut], kept[cut : have[0] - cut]
    else:
        cut = (have[1] - int(size[1] * (have[0] / size[0]))) // 2
        x, kept = x[:, cut : have[1] - cut], kept[:, cut : have[1] - cut]
    return torch.cat([features[0][mask[0]], x[kept]])


def test_all_kinds_are_dispatched():
    assert CASES
    assert golden_cases("hired", FOLDER) == CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    grid = tuple(case["grid"].tolist())
    method = vtc.create("hired", alpha=case.number("alpha"), variant="reference")
    start, packed = 0, []
    for image, tiles in enumerate(case["num_patches"].tolist()):
        low, top = (case[name][start : start + tiles] for name in ("top_cls", "bottom_cls"))
        budget = int(tiles * grid[0] * grid[1] * case.number("token_budget_rate"))
        tokens = image_tokens(low, top, grid, budget)
        token_map = method.stages()[0].decide(tokens)
        mask = case[f"mask{image}"]
        assert flat(token_map, mask.shape[1]) == mask.flatten().nonzero()[:, 0].tolist()
        size = tuple(case["image_sizes"][image].tolist())
        packed.append(pack(case["features"][start : start + tiles], mask, grid, size))
        start += tiles
    assert [len(part) for part in packed] == case["packed_lens"].tolist()
    assert torch.equal(torch.cat(packed), case["packed"])


def test_shares_follow_the_regions():
    # 2 x 2 tiles of 4 x 4 tokens; all early attention lies in the lower right quarter of the full image
    low = torch.zeros(5, 1, 4, 4)
    low[0, 0, 2:, 2:] = 0.25
    top = torch.rand(5, 1, 16, generator=torch.Generator().manual_seed(0))
    tokens = image_tokens(low.flatten(2), top, (4, 4), 20, (2, 2))
    assert counts(tokens) == (10, 0, 0, 0, 10)
    keep = vtc.create("hired").stages()[0].decide(tokens).anchor
    assert torch.equal(keep[4], top[4, 0].topk(10).indices.sort().values)
    assert torch.equal(keep[0], top[0, 0].topk(10).indices.sort().values)
    # what a full tile cannot take goes to the others
    many = counts(image_tokens(low.flatten(2), top, (4, 4), 60, (2, 2)))
    assert (many[0], many[4], sum(many)) == (16, 16, 60)
    # and comes back to the full image when all of them are full
    assert counts(image_tokens(low.flatten(2), top, (4, 4), 74, (2, 2)), alpha=0.0) == (10, 16, 16, 16, 16)
    even = image_tokens(torch.ones(5, 1, 16), top, (4, 4), 16, (2, 2))
    assert counts(even) == (8, 2, 2, 2, 2)


def test_seats_are_proportional():
    low = torch.zeros(7, 1, 6, 6)
    # tiles in 2 rows and 3 columns, row by row: 1 and 5 get a third each, 3 and 4 a sixth
    for number, weight in ((1, 4.0), (5, 4.0), (3, 2.0), (4, 2.0)):
        row, column = (number - 1) // 3 * 3, (number - 1) % 3 * 2
        low[0, 0, row : row + 3, column : column + 2] = weight
    tokens = image_tokens(low.flatten(2), torch.rand(7, 1, 36), (6, 6), 48, (2, 3))
    assert counts(tokens) == (24, 8, 0, 4, 4, 8, 0)


def test_tiles_side_by_side():
    # one row of three tiles over a square full image: a token belongs to the tile over its middle
    low = torch.zeros(4, 1, 3, 3)
    low[0, 0, :, 1] = 1.0
    assert counts(image_tokens(low.flatten(2), torch.rand(4, 1, 9), (3, 3), 8, (1, 3))) == (4, 0, 4, 0)
    low = low.transpose(2, 3)
    assert counts(image_tokens(low.flatten(2), torch.rand(4, 1, 9), (3, 3), 8, (3, 1))) == (4, 0, 4, 0)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_images_of_a_batch_do_not_share(variant):
    generator = torch.Generator().manual_seed(2)
    parts = []
    for image, (tiles, shape, budget) in enumerate([(5, (2, 2), 31), (1, (0, 0), 6), (3, (2, 1), 9)]):
        low, top = (torch.rand(tiles, 2, 16, generator=generator) for _ in range(2))
        parts.append([image_tokens(low, top, (4, 4), budget, shape, number) for number in (0, image)])
    alone = [vtc.create("hired", variant=variant).stages()[0].decide(part) for part, _ in parts]
    rows = [part for _, part in parts]
    together = vtc.Tokens(
        torch.cat([part.x for part in rows]),
        sum((part.lengths for part in rows), ()),
        Layout.grid(4, 4, groups=9),
        {name: torch.cat([part.signals[name] for part in rows]) for name in rows[0].signals},
        budget=sum((part.budget for part in rows), ()),
    )
    joined = vtc.create("hired", variant=variant).stages()[0].decide(together)
    assert joined.lengths == sum((one.lengths for one in alone), ())
    kept = [row[:n].tolist() for row, n in zip(joined.anchor, joined.lengths, strict=True)]
    assert kept == [row[:n].tolist() for one in alone for row, n in zip(one.anchor, one.lengths, strict=True)]
    if variant == "paper":
        assert [sum(one.lengths) for one in alone] == [31, 6, 9]


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_one_grid_spends_the_whole_budget(variant):
    score = torch.rand(1, 1, 16, generator=torch.Generator().manual_seed(1))
    tokens = image_tokens(score, score, (4, 4), 6)
    keep = vtc.create("hired", variant=variant).stages()[0].decide(tokens).anchor
    assert torch.equal(keep[0], score[0, 0].topk(6).indices.sort().values)


def test_a_tile_that_lost_its_padding_gets_no_more_than_it_has():
    # the second tile is cut to its first 5 tokens, as unpadding does, and a third one was left out altogether
    low = torch.ones(3, 1, 16)
    full = image_tokens(low, torch.rand(3, 1, 16, generator=torch.Generator().manual_seed(4)), (4, 4), 30, (3, 1))
    tokens = vtc.Tokens(full.x, (16, 16, 5), full.layout, full.signals, budget=(10, 10, 10))
    token_map = vtc.create("hired").stages()[0].decide(tokens)
    assert sum(token_map.lengths) == 30
    assert token_map.lengths[2] <= 5
    assert token_map.anchor[2].max() < 5
