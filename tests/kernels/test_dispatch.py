"""Which path runs and why, what torch.compile and FLOP counters see, and what the operations refuse."""

import pathlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vtc.kernels as kernels
from vtc.kernels import _dispatch

X = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0))
Q = X[:, None].expand(-1, 4, -1, -1)
CALLS = {
    "attention_rows": lambda x=X, q=Q, impl=None: kernels.attention_rows(q[:, :, :2], q, impl=impl),
    "bipartite_match": lambda x=X, q=Q, impl=None: kernels.bipartite_match(x, impl=impl),
    "compact": lambda x=X, q=Q, impl=None: (
        kernels.compact(torch.zeros(2, 3, dtype=torch.int64), x, cos=x, impl=impl).hidden
    ),
    "cosine_match": lambda x=X, q=Q, impl=None: kernels.cosine_match(x, x, topk=2, impl=impl),
    "dpp_map": lambda x=X, q=Q, impl=None: kernels.dpp_map(x[:, :16], 3, impl=impl),
    "dpp_map_features": lambda x=X, q=Q, impl=None: kernels.dpp_map_features(x, x[..., 0].abs(), 3, impl=impl),
    "farthest_point": lambda x=X, q=Q, impl=None: kernels.farthest_point(x, 3, impl=impl),
    "frame_similarity": lambda x=X, q=Q, impl=None: kernels.frame_similarity(q, impl=impl),
    "max_min": lambda x=X, q=Q, impl=None: kernels.max_min(x, 3, impl=impl),
    "max_sum": lambda x=X, q=Q, impl=None: kernels.max_sum(x, 3, impl=impl),
    "received_attention": lambda x=X, q=Q, impl=None: kernels.received_attention(q, q, impl=impl),
    "segment_merge": lambda x=X, q=Q, impl=None: kernels.segment_merge(
        x, torch.zeros(2, 33, dtype=torch.int64), 2, impl=impl
    ),
    "similarity_degree": lambda x=X, q=Q, impl=None: kernels.similarity_degree(x, impl=impl),
    "similarity_propagate": lambda x=X, q=Q, impl=None: kernels.similarity_propagate(
        x, x[..., 0], threshold=0.1, impl=impl
    ),
    "temporal_match": lambda x=X, q=Q, impl=None: kernels.temporal_match(x, 0.5, impl=impl),
}
every = pytest.mark.parametrize("name", sorted(CALLS))


def test_every_public_operation_is_called_here():
    operations = {name for name in kernels.__all__ if name.islower() and name != "choose_path"}
    assert operations == set(CALLS)
    assert kernels.__all__ == sorted(kernels.__all__)


@every
def test_operator_is_registered_with_a_fake_and_a_flop_formula(name):
    real = CALLS[name]()
    with FlopCounterMode(display=False) as counter:
        CALLS[name]()
    seen = [str(op) for op in counter.get_flop_counts().get("Global", {})]
    assert all(op.startswith("vtc.") for op in seen), "an operation must be opaque to the counter"
    assert (counter.get_total_flops() > 0) is (name != "compact")
    with FakeTensorMode() as mode:
        fake = CALLS[name](mode.from_tensor(X), mode.from_tensor(Q))
    real, fake = (out if isinstance(out, tuple) else (out,) for out in (real, fake))
    assert [(o.shape, o.dtype) for o in real] == [(o.shape, o.dtype) for o in fake]


def test_every_operation_is_one_node_of_a_full_graph():
    """Without the shape hook (checked functions do not compile in one graph), in a process of its own."""
    code = (
        "import sys, torch\n"
        "from torch._dynamo.backends.debugging import aot_eager\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "from test_dispatch import CALLS, Q, X\n"
        "for name, call in CALLS.items():\n"
        "    torch._dynamo.reset()\n"
        "    nodes = []\n"
        "    def backend(graph, inputs):\n"
        "        nodes.extend(n for n in graph.graph.nodes if str(n.target).startswith('vtc.'))\n"
        "        return aot_eager(graph, inputs)\n"
        "    compiled = torch.compile(lambda x, q: call(x * 2, q), fullgraph=True, backend=backend)\n"
        "    want, got = call(X * 2, Q), compiled(X, Q)\n"
        "    want, got = (out if isinstance(out, tuple) else (out,) for out in (want, got))\n"
        "    assert len(nodes) == 1, (name, nodes)\n"
        "    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), name\n"
        "print('compiled', len(CALLS))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compiled", str(len(CALLS))]


def test_flops_of_a_match_are_two_per_multiply_add():
    with FlopCounterMode(display=False) as counter:
        kernels.cosine_match(X, X)
    assert counter.get_total_flops() == 2 * 2 * 16 * (33 * 33 + 33 + 33)


@every
def test_two_calls_agree_bit_for_bit_and_inputs_stay(name):
    before = X.clone()
    first, second = CALLS[name](), CALLS[name]()
    first, second = (out if isinstance(out, tuple) else (out,) for out in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(X, before)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_empty_batch_and_single_token(batch, impl):
    x = torch.ones(batch, 1, 4)
    assert kernels.cosine_match(x, x, impl=impl)[1].shape == (batch, 1, 1)
    assert kernels.cosine_match(x, x[:, :0], impl=impl)[1].tolist() == [[[-1]]] * batch
    assert kernels.similarity_degree(x, impl=impl).tolist() == [[1.0]] * batch
    assert kernels.bipartite_match(x, impl=impl)[1].tolist() == [[-1]] * batch
    options = {"threshold": 0.5, "temperature": 0.1, "steps": 3}
    assert kernels.similarity_propagate(x, x[..., 0], **options, impl=impl).tolist() == [[1.0]] * batch
    assert kernels.temporal_match(x[:, :0], 0.5, impl=impl).tolist() == [[[0] * 4]] * batch
    assert kernels.max_min(x, 2, impl=impl).tolist() == [[0, -1]] * batch
    assert kernels.farthest_point(x, 2, impl=impl).tolist() == [[0, -1]] * batch
    assert kernels.max_sum(x, 2, impl=impl).tolist() == [[0, -1]] * batch
    assert kernels.dpp_map((x, x[..., 0]), 2, impl=impl).tolist() == [[0, -1]] * batch
    assert kernels.received_attention(x[:, None], x[:, None], impl=impl).tolist() == [[1.0]] * batch
    assert kernels.attention_rows(x[:, None], x[:, None], impl=impl).tolist() == [[[1.0]]] * batch
    assert kernels.segment_merge(x, torch.zeros(batch, 1, dtype=torch.int64), 2, impl=impl).shape == (batch, 2, 4)
    assert kernels.frame_similarity(x[:, None], impl=impl).shape == (batch, 0, 1)
    assert kernels.compact(torch.zeros(batch, 1, dtype=torch.int64), x, impl=impl).hidden.shape == (batch, 1, 4)


def test_cpu_tensors_take_the_torch_path_and_say_why(monkeypatch):
    monkeypatch.delenv("VTC_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = kernels.choose_path(X)
    assert path.name == "torch"
    assert "cpu" in path.reason or "not installed" in path.reason


def test_environment_forces_a_path_and_the_argument_wins(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VTC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="VTC_KERNELS=triton forces it"):
        kernels.choose_path(X)
    assert kernels.choose_path(X, "torch").name == "torch"
    monkeypatch.setenv("VTC_KERNELS", "cuda")
    with pytest.raises(ValueError, match="choose one of"):
        kernels.choose_path(X)


def test_each_value_of_the_environment_is_a_reason(monkeypatch):
    monkeypatch.setattr(_dispatch, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("VTC_KERNELS", raising=False)
    assert kernels.choose_path(X) == ("torch", "Triton interprets kernels here, which is for tests only")
    monkeypatch.setenv("VTC_KERNELS", "triton")
    assert kernels.choose_path(X) == ("triton", "VTC_KERNELS=triton forces it")
    with pytest.raises(RuntimeError, match=r"do not take torch\.float64"):
        kernels.choose_path(X.double())
    monkeypatch.setenv("VTC_KERNELS", "torch")
    assert kernels.choose_path(X) == ("torch", "VTC_KERNELS=torch forces it")


def test_missing_triton_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.delenv("VTC_KERNELS", raising=False)
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    assert kernels.choose_path(X) == ("torch", "Triton is not installed")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        kernels.cosine_match(X, X, impl="triton")


def test_the_package_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vtc.kernels as kernels\n"
        "assert kernels.farthest_point(torch.eye(3)[None], 2).tolist() == [[0, 1]]"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.cosine_match(X, X, topk=0), "topk=0"),
        (lambda: kernels.similarity_degree(X, reduce="max"), "reduce='max'"),
        (lambda: kernels.similarity_degree(X, reduce="count"), "threshold"),
        (lambda: kernels.similarity_propagate(X, X[..., 0], temperature=0.0), "temperature=0.0"),
        (lambda: kernels.received_attention(Q[:, :3], Q[:, :2]), "multiple"),
        (lambda: kernels.attention_rows(Q[:, :3], Q[:, :2]), "multiple"),
        (lambda: kernels.farthest_point(X, -1), "k=-1"),
        (lambda: kernels.segment_merge(X, torch.zeros(2, 33, dtype=torch.int64), 2, reduce="max"), "reduce='max'"),
    ],
)
def test_bad_arguments_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
