"""What a CPU keeps of a similarity graph: the three forms of a tile, the room they take, and what they give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc.kernels as kernels
from vtc.kernels import _cosine, _graph

TILE = 16


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(_cosine, "SYMMETRIC_TILE", TILE)
    monkeypatch.setattr(_cosine, "LEAST_TILE", TILE)
    monkeypatch.setattr(_graph, "KEPT_AT_LEAST", 0)


def tokens(seed, count, width, alike=0.0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, width, generator=source) + alike * torch.randn(2, 1, width, generator=source)


def graph_of(x, kind=_graph.EXPONENTIAL, threshold=None, temperature=0.5, **options):
    return _graph.Graph(x, _cosine.inverse_norm(x), kind, threshold, temperature, **options)


def dense(x, kind, threshold, temperature):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    s = unit @ unit.mT
    edge = torch.ones_like(s) if threshold is None else (s >= threshold).double()
    return edge * {0: s, 1: torch.ones_like(s), 2: ((s - 1) / temperature).exp()}[kind]


def forms(graph):
    return [type(kept).__name__ for kept in graph._kept.values()]


def size_of(graph):
    return sum(part.numel() * part.element_size() for kept in graph._kept.values() for part in kept)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    count=st.sampled_from([1, 15, 16, 17, 70]),
    kind=st.sampled_from([_graph.IDENTITY, _graph.INDICATOR, _graph.EXPONENTIAL]),
    threshold=st.sampled_from([None, 0.1, -0.1, 0.9]),
    share=st.sampled_from([0.0, 0.7, 1.4, 9.0]),
)
def test_every_use_gives_the_product_with_the_definition(seed, count, kind, threshold, share):
    threshold = 0.1 if kind == _graph.INDICATOR else threshold
    x, weight = tokens(seed, count, 24), torch.rand(2, count, generator=torch.Generator().manual_seed(seed))
    matrix = dense(x, kind, threshold, 0.5)
    s = dense(x, _graph.IDENTITY, None, 1.0)
    if threshold is not None and (s - threshold).abs().min() < 1e-5:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_graph, "KEPT_PER_PAIR", share)
        graph = graph_of(x, kind, threshold, keep=True)
        for _ in range(3):
            expected = (matrix @ weight.double()[..., None])[..., 0]
            torch.testing.assert_close(graph.apply(weight).double(), expected, atol=2e-5, rtol=2e-5)


def test_sparse_tiles_are_kept_as_edges_dense_ones_rounded_and_the_rest_recomputed():
    x = torch.cat([tokens(0, 32, 64), tokens(1, 38, 64, alike=3.0)], dim=1)
    graph = graph_of(x, threshold=0.6, keep=True)
    graph.apply(torch.ones(2, 70))
    places = list(_cosine.symmetric_places(x))
    assert set(forms(graph)) == {"Edges", "Rounded"}
    everything = graph_of(tokens(2, 70, 64, alike=3.0), keep=True)
    everything.apply(torch.ones(2, 70))
    assert set(forms(everything)) == {"Rounded"}
    assert 0 < len(everything._kept) < len(places), "a dense graph does not fit completely"


@pytest.mark.parametrize("width", [4, 64], ids=["bound-by-the-input", "bound-by-the-pairs"])
def test_what_is_kept_stays_within_its_room(width):
    x = tokens(3, 90, width, alike=3.0)
    graph = graph_of(x, keep=True)
    graph.apply(torch.ones(2, 90))
    room = _graph.kept_bytes(2, 90, width)
    assert room == min(_graph.KEPT_PER_INPUT * 4 * 2 * 90 * width, int(_graph.KEPT_PER_PAIR * 2 * 90**2))
    assert room - 3 * 2 * TILE**2 < size_of(graph) <= room


def test_rounded_entries_keep_sixteen_bits_and_their_sign(monkeypatch):
    monkeypatch.setattr(_graph, "KEPT_PER_PAIR", 3)
    x = tokens(4, TILE, 64)
    kept = graph_of(x, _graph.IDENTITY, keep=True)
    once = kept.apply(torch.ones(2, TILE))
    assert forms(kept) == ["Rounded", "Rounded"]  # one tile per sample
    tile = torch.cat([part.restore((1, TILE, TILE)) for part in kept._kept.values()])
    exact = dense(x, _graph.IDENTITY, None, 1.0)
    assert ((tile.double() - exact).abs() <= 2.0**-16 * exact.abs() + 1e-6).all()
    torch.testing.assert_close(kept.apply(torch.ones(2, TILE)), once, atol=1e-5, rtol=0)


def test_a_graph_that_fits_is_kept_unrounded(monkeypatch):
    monkeypatch.setattr(_graph, "KEPT_AT_LEAST", 4 * 2 * 70**2)
    x, weight = tokens(7, 70, 64, alike=3.0), torch.rand(2, 70)
    graph = graph_of(x, keep=True)
    first = graph.apply(weight)
    assert set(forms(graph)) == {"Whole"}
    assert torch.equal(graph.apply(weight), first)
    assert torch.equal(graph.apply(weight), first)


@pytest.mark.parametrize(("keep", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_nothing_is_kept_unasked_or_of_an_oracle(keep, dtype):
    graph = graph_of(tokens(5, 40, 24).to(dtype), keep=keep)
    graph.apply(torch.ones(2, 40, dtype=dtype))
    assert not graph._kept


def test_many_steps_compute_the_similarities_once(monkeypatch):
    computed = []
    tile = _graph.cosine_tile
    monkeypatch.setattr(_graph, "cosine_tile", lambda *a: (computed.append(a[2]), tile(*a))[1])
    x, y = tokens(6, 70, 64), torch.rand(2, 70)
    options = {"threshold": 0.5, "temperature": 0.03, "transpose": True, "impl": "torch"}
    kernels.similarity_propagate(x, y, steps=5, **options)
    assert len(computed) == len(list(_cosine.symmetric_places(x))) == 2 * 15


@pytest.mark.parametrize("temperature", [1e-4, 0.03, 1.0, 1e4])
def test_a_pair_below_the_threshold_has_no_weight_at_any_temperature(temperature):
    x = torch.eye(3)[None, [0, 0, 1]]  # one edge of weight 1, two pairs below the threshold
    out = kernels.similarity_propagate(
        x, torch.tensor([[1.0, 2.0, 4.0]]), threshold=0.5, temperature=temperature, impl="torch"
    )
    torch.testing.assert_close(out, torch.tensor([[1.5, 1.5, 4.0]]))


def test_a_similarity_equal_to_the_threshold_is_an_edge():
    x = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 0.0], [1.0, 1.0, 1.0, -1.0]]])  # cosine 0.5: first, third
    for impl in ("reference", "torch"):
        out = kernels.similarity_propagate(x, torch.tensor([[0.0, 0.0, 1.0]]), threshold=0.5, impl=impl)
        assert out[0, 0] == 0.5
