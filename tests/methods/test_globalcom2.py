"""GlobalCom2 against the authors' code, and the budget that it meets."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.testing.golden import golden_cases
from vtc.tokens import Layout

CASES = golden_cases("globalcom2", Path(__file__).parents[1] / "golden")


def groups(logits, valid, side, grid, budget, features=None):
    """The full image and its tiles as groups, valid tokens first; `valid` is [tiles, N] of the tiles."""
    valid = torch.cat([torch.ones_like(valid[:1]), valid])
    lengths = tuple(valid.sum(1).tolist())
    index = (~valid).long().argsort(dim=1, stable=True)[:, : max(lengths)]
    padding = torch.arange(index.shape[1]) >= torch.tensor(lengths)[:, None]
    index = index.masked_fill(padding, -1)
    layout = Layout.grid(side, side, groups=len(valid)).take(index)
    tile = torch.tensor([[0, number, *grid] for number in range(len(valid))])
    logits = logits.gather(1, index.clamp(min=0)).masked_fill(padding, 9.0)
    x = torch.zeros(*index.shape, 4) if features is None else features
    return vtc.Tokens(x, lengths, layout, {"cls_logits": logits, "tile": tile}, budget=budget), index


def recorded(case):
    queries, keys = case["in_q"], case["in_k"]
    logits = (queries[:, :, :1] @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(logits, case["out_cls_logits"], atol=1e-5, rtol=1e-5)
    ratio, side = case.number("param_retention_ratio"), case.number("param_side")
    grid = case.number("param_grid_height"), case.number("param_grid_width")
    valid = case["out_unpad_mask"]
    budget = tuple(max(1, int(n * ratio)) for n in (side * side, *valid.sum(1).tolist()))
    tokens, index = groups(logits, valid, side, grid, budget)
    return vtc.create("globalcom2", variant="reference", ratio=ratio), tokens, index


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    method, tokens, index = recorded(case)
    local = method.local(tokens)
    base = case.number("param_retention_ratio")
    torch.testing.assert_close((base * method.scales(tokens, local)).clamp(max=1.0)[1:], case["out_scales"])
    combined = method.combined(tokens, local)
    keep = method.filter(tokens)
    place = index.gather(1, keep.clamp(min=0)).masked_fill(keep < 0, -1)
    assert place[0][place[0] >= 0].tolist() == sorted(case["out_thumb_idx_score_order"].tolist())
    for tile, (expected, score) in enumerate(zip(case["out_kept_mask"], case["out_combined_scores"], strict=True), 1):
        assert place[tile][place[tile] >= 0].tolist() == expected.nonzero()[:, 0].tolist()
        n = tokens.lengths[tile]
        torch.testing.assert_close(combined[tile, :n], score[index[tile, :n]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_meets_the_budget(case):
    """Exactly; the full image keeps what it keeps in the published code, tiles are within one seat of the formula."""
    reference, tokens, _ = recorded(case)
    method = vtc.create("globalcom2")
    counts = torch.tensor(method.stages()[0].decide(tokens).lengths)
    assert counts.sum() == sum(tokens.budget)
    assert counts[0] == tokens.budget[0]
    assert torch.equal(method.filter(tokens)[0, : counts[0]], reference.filter(tokens)[0, : counts[0]])
    area = torch.tensor(tokens.lengths[1:])
    share = area * method.scales(tokens, method.local(tokens))[1:]
    share = share / share.sum() * (sum(tokens.budget) - tokens.budget[0])
    if bool((share < area).all()):
        assert bool((counts[1:] - share).abs().max() <= 1.0)


def test_tiles_that_the_full_image_favours_get_more():
    logits = torch.zeros(5, 16)
    logits[0].view(4, 4)[:2, 2:] = 3.0  # the region of the second tile
    logits[1:] = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    tokens, _ = groups(logits, torch.ones(4, 16, dtype=torch.bool), 4, (2, 2), (6,) * 5)
    counts = vtc.create("globalcom2").stages()[0].decide(tokens).lengths
    assert counts[2] == max(counts[1:]) > 6
    even = vtc.create("globalcom2", temperature=1e6).stages()[0].decide(tokens).lengths
    assert even[1:] == (6, 6, 6, 6)


def test_two_images_do_not_mix():
    generator = torch.Generator().manual_seed(1)
    parts = []
    for image, grid in enumerate([(2, 2), (1, 2)]):
        tiles = grid[0] * grid[1]
        logits = torch.randn(tiles + 1, 16, generator=generator)
        one, _ = groups(logits, torch.ones(tiles, 16, dtype=torch.bool), 4, grid, (5,) * (tiles + 1))
        one.signals["tile"][:, 0] = image
        parts.append(one)
    joined = vtc.Tokens(
        torch.cat([part.x for part in parts]),
        parts[0].lengths + parts[1].lengths,
        Layout.grid(4, 4, groups=8),
        {name: torch.cat([part.signals[name] for part in parts]) for name in ("tile", "cls_logits")},
        budget=(5,) * 8,
    )
    method = vtc.create("globalcom2")
    together = method.stages()[0].decide(joined)
    first = 0
    for image, part in enumerate(parts):
        part.signals["tile"][:, 0] = 0
        alone = method.stages()[0].decide(part)
        for g, n in enumerate(alone.lengths):
            assert together.lengths[first + g] == n, image
            assert torch.equal(together.anchor[first + g, :n], alone.anchor[g, :n])
        first += len(alone.lengths)


def test_towers_without_cls_score_by_distance_from_the_mean():
    x = torch.nn.functional.normalize(torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    x[0, 5] = -(x[0].sum(0) - x[0, 5]) / 2  # against the mean
    layout, tile = Layout.grid(4, 4), torch.zeros(1, 4, dtype=torch.long)
    tokens = vtc.Tokens(x, (16,), layout, {"tile": tile}, budget=(1,))
    assert vtc.create("globalcom2", score="mean").filter(tokens).tolist()[0][0] == 5


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"ratio": 2.0}, {"score": "none"}, {"variant": "mine"}], ids=str
)
def test_wrong_options(options):
    with pytest.raises(errors.SpecError):
        vtc.create("globalcom2", **options)
