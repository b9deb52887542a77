"""TopV-style pruning: cost, plan and recovery by their definitions (there is no published code)."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.methods.topv import ITERATIONS
from vtc.tokens import Layout, Tokens


def tokens_of(budget=8, side=5, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, 1, side * side, width, generator=generator).double()
    return vtc.Tokens.of(
        source.float(), budget, Layout.grid(side, side), layer_input=source.float(), mlp_input=target.float()
    )


def by_hand(tokens, method):
    """The cost and the plan of one group, in the plain domain."""
    source, target = (tokens.signal(name)[0].double() for name in ("layer_input", "mlp_input"))
    n, layout = len(source), tokens.layout
    cost = torch.zeros(n, n, dtype=torch.float64)
    features = torch.cdist(source, target)
    height, width = layout.grids[0][0]
    for i in range(n):
        row, column = float(layout.row[0, i]), float(layout.col[0, i])
        centre = ((row - (height - 1) / 2) ** 2 + (column - (width - 1) / 2) ** 2) ** 0.5
        for j in range(n):
            apart = (row - float(layout.row[0, j])) ** 2 + (column - float(layout.col[0, j])) ** 2
            near = 1 - torch.tensor(-apart / (2 * method.sigma**2)).exp()
            cost[i, j] = method.alpha * features[i, j] / features.mean() + method.beta * near + method.gamma * centre
    kernel = (-cost / method.epsilon).exp()
    mass = source.norm(dim=1) if method.marginals == "norm" else torch.ones(n, dtype=torch.float64)
    mass = mass / mass.sum()
    u, v = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    for _ in range(ITERATIONS):
        u = mass / (kernel @ v)
        v = (1 / n) / (kernel.T @ u)
    return cost, u[:, None] * kernel * v


@pytest.mark.parametrize("marginals", ["uniform", "norm"])
@pytest.mark.parametrize("importance", ["max", "cost"])
def test_ranking(marginals, importance):
    tokens = tokens_of()
    method = vtc.create("topv", marginals=marginals, importance=importance, recover=0.0, sigma=2.0, gamma=0.2)
    cost, plan = by_hand(tokens, method)
    torch.testing.assert_close(method.cost(tokens)[0].double(), cost, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.plan(tokens, method.cost(tokens))[0].double(), plan, atol=1e-6, rtol=1e-3)
    score = plan.amax(dim=1) if importance == "max" else -(plan * cost).sum(dim=1) / plan.sum(dim=1)
    keep = method.stages()[0].decide(tokens).anchor[0]
    assert torch.equal(keep, score.topk(8).indices.sort().values)


def test_row_sums_would_be_the_marginals_and_the_score_is_not():
    tokens = tokens_of()
    for importance in ("max", "cost"):
        method = vtc.create("topv", importance=importance)
        plan = method.plan(tokens, method.cost(tokens), iterations=2000)
        sums = plan.sum(dim=2)[0]
        assert float(sums.std()) < 1e-3 * float(sums.mean())
        score = method.score(tokens)[0]
        assert float(score.std()) > 0.02 * float(score.abs().mean())


def test_plans_survive_a_sharp_epsilon():
    tokens = tokens_of()
    method = vtc.create("topv", epsilon=1e-3)
    plan = method.plan(tokens, method.cost(tokens))
    assert bool(torch.isfinite(plan).all())
    torch.testing.assert_close(plan.sum(dim=1), torch.full((1, 25), 1 / 25), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("budget", "recover"), [(10, 0.2), (10, 0.5), (24, 0.9), (4, 0.2), (5, 0.2)])
def test_recovered_tokens_are_spread_over_the_others(budget, recover):
    tokens = tokens_of(budget)
    method = vtc.create("topv", recover=recover)
    number = int(recover * budget)
    order = method.score(tokens)[0].argsort(descending=True).tolist()
    best = set(order[: budget - number])
    rest = [token for token in range(25) if token not in best]
    keep = method.stages()[0].decide(tokens).anchor[0].tolist()
    assert len(keep) == budget
    assert best <= set(keep)
    places = [rest.index(token) for token in keep if token not in best]
    assert len(places) == number
    steps = [b - a for a, b in zip([-1, *places], places, strict=False)]
    assert all(len(rest) // max(1, number) <= step <= -(-len(rest) // max(1, number)) for step in steps)


def test_other_segments_and_separators_are_far():
    layout = Layout(
        torch.tensor([[0, 0, -1, 0]]), torch.tensor([[0, 1, -1, 0]]), torch.tensor([[0, 0, -1, 1]]), (((1, 2), (1, 1)),)
    )
    x = torch.ones(1, 4, 3)
    tokens = vtc.Tokens.of(x, 2, layout, layer_input=x, mlp_input=x)
    cost = vtc.create("topv", gamma=0.0, sigma=1.0).cost(tokens)[0]
    near = 1 - torch.tensor(-0.5).exp()
    expected = torch.ones(4, 4)
    expected[:2, :2] = torch.tensor([[0.0, near], [near, 0.0]])
    expected[3, 3] = 0
    torch.testing.assert_close(cost, expected)


def test_tokens_without_a_grid_are_refused():
    x = torch.ones(1, 4, 3)
    with pytest.raises(errors.InputError, match="layout"):
        vtc.create("topv").filter(Tokens.of(x, 2, layer_input=x, mlp_input=x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"marginals": "none"}, "marginals='none'"),
        ({"importance": "sum"}, "importance='sum'"),
        ({"recover": 1.0}, "recover=1.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("topv", **options)
