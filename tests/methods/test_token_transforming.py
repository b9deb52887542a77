"""Token Transforming as reconstructed: what the abstract says about W holds, and nothing more is claimed."""

import pytest
import torch

import vtc


def tokens(budget, n=20, prefix=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return vtc.Tokens.of(
        torch.randn(2, n + prefix, 6, generator=generator),
        budget,
        num_prefix=prefix,
        keys=torch.randn(2, 2, n + prefix, 4, generator=generator),
        received_attention=torch.rand(2, n, generator=generator),
        sizes=torch.randint(1, 5, (2, n + prefix), generator=generator).float(),
    )


def test_rows_of_the_matrix_sum_to_one_and_mass_is_kept():
    token_map = vtc.create("token-transforming").stages()[0].decide(tokens(8))
    assert token_map.lengths == (9, 9)
    torch.testing.assert_close(token_map.matrix().sum(dim=2), torch.ones(2, 9))
    torch.testing.assert_close(token_map.matrix(mass=True).sum(dim=1), torch.ones(2, 21))


def test_many_to_many():
    """A token that goes is in `spread` others, one that stays in itself alone, and [CLS] takes nothing in."""
    matrix = vtc.create("token-transforming", spread=3).stages()[0].decide(tokens(8)).matrix()
    counts = (matrix > 0).sum(dim=1)
    assert sorted(set(counts.flatten().tolist())) == [1, 3]
    assert (counts == 3).sum(dim=1).tolist() == [12, 12]
    assert torch.equal(matrix[:, 0, 1:], torch.zeros(2, 20))


def test_weights_are_the_softmax_of_the_cosine_by_size():
    given = tokens(8)
    method = vtc.create("token-transforming", spread=8, temperature=0.5)
    token_map = method.stages()[0].decide(given)
    metric = torch.nn.functional.normalize(given.signal("keys").mean(dim=1), dim=-1)
    for b in range(2):
        kept = token_map.anchor[b, 1:].tolist()
        weight = torch.zeros(21, 21)
        weight[range(21), range(21)] = 1.0
        for i in set(range(1, 21)) - set(kept):
            weight[i] = 0
            weight[i, kept] = (metric[b, kept] @ metric[b, i] / 0.5).softmax(0)
        share = (weight * given.signal("sizes")[b][:, None]).T[[0, *kept]]
        expected = (share / share.sum(dim=1, keepdim=True)) @ given.x[b]
        torch.testing.assert_close(token_map.apply(given.x)[b], expected, atol=1e-5, rtol=1e-5)


def test_one_target_is_plain_merging():
    counts = (vtc.create("token-transforming", spread=1).stages()[0].decide(tokens(8)).matrix() > 0).sum(dim=1)
    assert set(counts.flatten().tolist()) == {1}


def test_equal_parts_leave_at_each_block():
    stages = [s.at_depth(23) for s in vtc.create("token-transforming").stages()]
    assert [s.site.index for s in stages] == [6, 12, 17]
    assert [s.schedule(576, 96) for s in stages] == [416, 256, 96]


@pytest.mark.parametrize("options", [{"blocks": ()}, {"blocks": (0.5, 0.25)}, {"spread": 0}, {"temperature": 0.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(vtc.VTCError, match="token-transforming"):
        vtc.create("token-transforming", **options)


def test_it_is_not_called_faithful():
    assert vtc.describe("token-transforming")["fidelity"] == "reconstructed"
