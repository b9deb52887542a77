"""TokenCorr's parts, each against its definition; there is no published code."""

import numpy as np
import torch

import vtc

N, HEADS, WIDTH = 40, 2, 8


def tokens_of(budget=N, keys=None, low=None, deep=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, HEADS, N, WIDTH, generator=generator) if keys is None else keys
    low = torch.rand(1, N, generator=generator).softmax(-1) if low is None else low
    deep = torch.rand(1, N, generator=generator) / N if deep is None else deep
    layers = torch.stack([low, deep], dim=1)
    return vtc.Tokens.of(torch.zeros(1, N, 4), budget, low_keys=keys, cls_attention=deep, cls_attention_layers=layers)


def kept(method, tokens):
    return method.stages()[0].decide(tokens).anchor[0].tolist()


def test_density_counts_patterns_that_do_not_repeat():
    keys = torch.eye(N)[None, None]  # all different
    method = vtc.create("tokencorr")
    assert method.density(tokens_of(keys=keys)).item() == N
    keys = keys.clone()
    keys[:, :, :10] = keys[:, :, :1]  # ten equal patches
    assert method.density(tokens_of(keys=keys)).item() == N - 10
    assert vtc.create("tokencorr", repeats=10).density(tokens_of(keys=keys)).item() == N
    assert method.density(tokens_of(keys=torch.ones(1, HEADS, N, WIDTH))).item() == 1


def test_all_tokens_of_a_crop_without_repetition_stay():
    assert kept(vtc.create("tokencorr"), tokens_of(keys=torch.eye(N)[None, None])) == list(range(N))


def test_outliers_are_those_of_numpy():
    deep = torch.rand(1, N, generator=torch.Generator().manual_seed(3)) / N
    deep[:, [4, 17]] = 0.2
    low, high = np.percentile(deep.numpy(), [25, 75])
    expected = (deep[0] > high + 1.5 * (high - low)).nonzero()[:, 0].tolist()
    assert expected == [4, 17]
    # equal keys leave one sampled token beside the outliers
    tokens = tokens_of(keys=torch.ones(1, HEADS, N, WIDTH), deep=deep)
    keep = kept(vtc.create("tokencorr", sample="top"), tokens)
    best = int(tokens.signal("cls_attention_layers")[0, 0].argmax())
    assert keep == sorted({4, 17, best})
    # and come first where the budget is smaller
    tokens = tokens_of(budget=2, keys=torch.eye(N)[None, None], deep=deep)
    assert kept(vtc.create("tokencorr"), tokens) == [4, 17]


def test_sampling_follows_the_probabilities():
    low = torch.full((1, N), 1e-4)
    low[:, :5] = 1.0
    keys = torch.zeros(1, 1, N, N)
    keys[0, 0, :, 0] = 1  # all alike ...
    keys[0, 0, -5:] = torch.eye(N)[-5:]  # ... but five
    counts = torch.zeros(N)
    for seed in range(20):
        keep = kept(vtc.create("tokencorr", seed=seed, outlier=1e9), tokens_of(keys=keys, low=low))
        assert len(keep) == 5
        counts[keep] += 1
    assert counts[:5].min() >= 18


def test_seed_decides_and_the_global_generator_does_not():
    tokens = tokens_of(budget=10, keys=torch.eye(N)[None, None])
    state = torch.random.get_rng_state()
    first = kept(vtc.create("tokencorr", seed=1), tokens)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert kept(vtc.create("tokencorr", seed=1), tokens) == first
    assert kept(vtc.create("tokencorr", seed=2), tokens) != first
