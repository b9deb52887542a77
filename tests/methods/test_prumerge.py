"""PruMerge and PruMerge+ against the authors' code."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import vtc
from vtc.testing.golden import golden_cases

CASES = golden_cases("prumerge", Path(__file__).parents[1] / "golden")


def tokens_of(x, k, q, budget):
    """One head of the full width, and [CLS] in front, as the vectors have it."""
    return vtc.Tokens.of(x, budget, num_prefix=1, keys=k[:, None], cls_query=q)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    x, kept = case["x"], case["kept_idx"]
    plus, adaptive = case.name.startswith("plus"), "adaptive" in case.name
    assert plus or case.name.startswith(("adaptive", "fixed")), "a kind of case that no test reads"
    slug = "prumerge-plus" if plus else "prumerge"
    budget = x.shape[1] - 1 if adaptive else case.number("topk") + 1
    method = vtc.create(slug, adaptive=adaptive, variant="reference")
    tokens = tokens_of(x, case["k"], case["q"], budget)
    torch.testing.assert_close(method.attention(tokens), case["cls_attn"], atol=1e-6, rtol=1e-5)
    picks = method.filter(tokens)
    assert torch.equal(picks[:, : kept.shape[1]] - 1, kept)
    assert bool((picks[:, kept.shape[1] :] < 0).all())
    token_map = method.stages()[0].decide(tokens)
    assert token_map.lengths == (kept.shape[1] + 1,) * x.shape[0]
    out = token_map.apply(x)[:, : kept.shape[1] + 1]
    torch.testing.assert_close(out, case["out"], atol=1e-5, rtol=1e-5)


def random_tokens(length, budget, seed=0, sharp=3.0):
    generator = torch.Generator().manual_seed(seed)
    x, k = (torch.randn(1, length + 1, 16, generator=generator) for _ in range(2))
    return tokens_of(x, k, sharp * torch.randn(1, 1, 16, generator=generator), budget)


def test_paper_averages_the_pruned_neighbours():
    tokens = random_tokens(40, 6)
    method = vtc.create("prumerge", adaptive=False, neighbours=5)
    token_map = method.stages()[0].decide(tokens)
    attention, keep = method.attention(tokens)[0], token_map.anchor[0] - 1
    assert keep.tolist() == sorted(attention.topk(6).indices.tolist())
    keys, x = normalize(tokens.signal("keys")[0, 0, 1:], dim=-1), tokens.x[0, 1:]
    pruned = [i for i in range(40) if i not in keep.tolist()]
    for slot, i in enumerate(keep.tolist()):
        members = [i, *sorted(pruned, key=lambda j: -float(keys[i] @ keys[j]))[:5]]
        weight = attention[members] / attention[members].sum()
        torch.testing.assert_close(token_map.apply(tokens.x)[0, slot], weight @ x[members], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(token_map.matrix().sum(2), torch.ones(1, 6))


@pytest.mark.parametrize("slug", ["prumerge", "prumerge-plus"])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_adaptive_counts_stay_within_the_budget(slug, variant):
    counts = []
    for budget in (1, 2, 5, 12, 40, 100):
        method = vtc.create(slug, variant=variant)
        token_map = method.stages()[0].decide(random_tokens(100, budget))
        (count,) = token_map.lengths
        assert 1 <= count <= budget
        assert int((token_map.anchor >= 0).sum()) == count
        counts.append(count)
    assert counts == sorted(counts)


@pytest.mark.parametrize("slug", ["prumerge", "prumerge-plus"])
@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16, 39, 40])
def test_fixed_budget_is_met(slug, variant, budget):
    method = vtc.create(slug, adaptive=False, variant=variant)
    token_map = method.stages()[0].decide(random_tokens(40, budget))
    anchor = token_map.anchor[0]
    assert token_map.lengths == (budget,)
    assert anchor.unique().numel() == budget
    assert anchor.tolist() == sorted(anchor.tolist())
    assert bool((anchor > 0).all())


def test_outliers_by_quartiles_of_each_image():
    quiet, loud = random_tokens(64, 64, seed=1, sharp=0.1), random_tokens(64, 64, seed=2, sharp=4.0)
    both = vtc.Tokens.of(
        torch.cat([quiet.x, loud.x]),
        64,
        num_prefix=1,
        **{name: torch.cat([quiet.signal(name), loud.signal(name)]) for name in ("keys", "cls_query")},
    )
    method = vtc.create("prumerge")
    lengths = method.stages()[0].decide(both).lengths
    for one, length in zip((quiet, loud), lengths, strict=True):
        score = method.attention(one)[0].double()
        low, high = score.quantile(0.25), score.quantile(0.75)
        assert length == max(1, int((score > high + 1.5 * (high - low)).sum()))
    assert lengths[0] < lengths[1]


def test_without_cls():
    tokens = random_tokens(40, 8)
    received = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    keys = tokens.signal("keys")[:, :, 1:]
    plain = vtc.Tokens.of(tokens.x[:, 1:], 8, keys=keys, received_attention=received)
    method = vtc.create("prumerge", adaptive=False, score="received")
    assert method.filter(plain)[0].tolist() == sorted(received[0].topk(8).indices.tolist())
    assert method.stages()[0].decide(plain).lengths == (8,)


@pytest.mark.parametrize(("length", "outliers", "kept"), [(196, 8, 7), (576, 29, 29), (144, 9, 9)])
def test_reference_counts_like_the_published_code(length, outliers, kept):
    score = 0.5 + torch.rand(1, length, generator=torch.Generator().manual_seed(0)) / 10
    score[0, 3 : 3 + outliers] += 1
    keys = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(1))
    tokens = vtc.Tokens.of(torch.zeros(1, length, 4), length, received_attention=score, keys=keys)
    stride = int(int(1 / (outliers / length)) / 3)
    strong = set(score[0].topk(kept).indices.tolist())
    samples = {"prumerge": set(), "prumerge-plus": set(range(0, length - 1, stride))}
    for slug, extra in samples.items():
        picks = vtc.create(slug, score="received", variant="reference").filter(tokens)[0]
        assert set(picks[picks >= 0].tolist()) == strong | extra
