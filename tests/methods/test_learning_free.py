"""Our reading of LFTR's image part against its definition; there is no published code."""

import torch

import vtc
from vtc.tokens import Layout


def tokens_of(x, budget, side):
    return vtc.Tokens.of(x, budget, Layout.grid(side, side, groups=x.shape[0]))


def test_significance_is_one_minus_the_mean_cosine_to_the_others():
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    score = vtc.create("learning-free").significance(tokens_of(x, 4, 4))
    torch.testing.assert_close(score[0].double(), 1 - cosine.sum(1) / 15, atol=1e-5, rtol=1e-5)


def test_mean_of_each_cell_is_weighted():
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    tokens = tokens_of(x, 4, 4)
    method = vtc.create("learning-free")
    token_map = method.stages()[0].decide(tokens)
    weight = method.significance(tokens)[0]
    cell = torch.tensor([0, 1, 4, 5])
    expected = (x[0, cell] * weight[cell, None]).sum(0) / weight[cell].sum()
    torch.testing.assert_close(token_map.apply(x)[0, 0], expected)
    torch.testing.assert_close(token_map.matrix().sum(2), torch.ones(1, 4))
    torch.testing.assert_close(token_map.sizes(), torch.full((1, 4), 4.0))


def test_equal_tokens_stay_equal():
    x = torch.ones(1, 16, 8)
    token_map = vtc.create("learning-free").stages()[0].decide(tokens_of(x, 5, 4))
    torch.testing.assert_close(token_map.apply(x), torch.ones(1, 5, 8))


def test_top_keeps_what_is_unlike_the_rest():
    x = torch.ones(1, 16, 8) + 0.01 * torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(2))
    x[:, [3, 9]] = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(3))
    token_map = vtc.create("learning-free", rule="top").stages()[0].decide(tokens_of(x, 2, 4))
    assert token_map.is_selection
    assert token_map.anchor.tolist() == [[3, 9]]
