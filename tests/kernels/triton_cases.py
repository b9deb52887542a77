"""Triton against the reference: run by `test_triton.py` in its own process, under the interpreter or on a device.

Every float allocated by the kernels starts as NaN and every integer as a large negative number, so an element that a
kernel forgets to write fails.
"""

import os

import pytest
import torch

import vtc.kernels as kernels
from vtc.kernels import _tiles

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
HALVES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]
COUNTS = [1, 63, 65] if IS_INTERPRETED else [1, 63, 65, 577, 2928]
WIDTHS = [40] if IS_INTERPRETED else [5, 40, 1024, 3584]
counts = pytest.mark.parametrize("n", COUNTS)
GREEDY_COUNTS = [1, 63] if IS_INTERPRETED else COUNTS
widths = pytest.mark.parametrize("width", WIDTHS)
types = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
types_and_counts = pytest.mark.parametrize(
    ("dtype", "n"), [(torch.float32, n) for n in COUNTS] + [(half, COUNTS[-1]) for half in HALVES], ids=str
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    def poison(function):
        def allocate(*arguments, **options):
            tensor = function(*arguments, **options)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**6))

        return allocate

    if IS_INTERPRETED:  # one split of the columns, so that a program visits several blocks
        monkeypatch.setattr(_tiles, "PROGRAMS_WANTED", 1)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def tokens(seed, dtype, *shape):
    """Features with a zero row, a duplicate and a gap between the elements of a row."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if shape[-2] > 4:
        x[..., 1, :] = 0
        x[..., 4, :] = x[..., 2, :]
    return torch.stack([x, x + 1], dim=-1).to(DEVICE, dtype).flatten(-2)[..., ::2]


def mask_of(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.7
    mask[-1] = mask[-1] & (shape[-1] != 63)  # one case without a single valid token
    return mask.to(DEVICE)


def without_synchronising(call):
    """The result of a call that may not wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def agree(call, tolerance=1e-5):
    """Triton and reference agree; on a device, so do two Triton runs bit for bit, and none waits for it."""
    expected, result = call("reference"), call("triton")
    again = result if IS_INTERPRETED else without_synchronising(lambda: call("triton"))
    if isinstance(expected, torch.Tensor):
        expected, result, again = (expected,), (result,), (again,)
    for name, (want, got, repeat) in enumerate(zip(expected, result, again, strict=True)):
        if want is None:
            assert got is None
            continue
        assert want.dtype == got.dtype
        assert torch.equal(got, repeat)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"output {n}: {m}")


@types_and_counts
@widths
@pytest.mark.parametrize("topk", [1, 3])
def test_cosine_match_values(dtype, n, width, topk):
    x, y = tokens(0, dtype, 2, n, width), tokens(1, dtype, 2, n + 70, width)
    options = {"source_mask": mask_of(2, n), "target_mask": mask_of(2, n + 70), "topk": topk}
    agree(lambda impl: kernels.cosine_match(x, y, **options, impl=impl)[0])


@pytest.mark.parametrize("programs", [1, 264], ids=["one-split", "splits"])
@pytest.mark.parametrize("topk", [1, 4])
def test_cosine_match_breaks_exact_ties_to_the_lowest_index(topk, programs, monkeypatch):
    monkeypatch.setattr(_tiles, "PROGRAMS_WANTED", programs)
    x = torch.eye(8, device=DEVICE)[torch.arange(150, device=DEVICE) % 8][None]
    agree(lambda impl: kernels.cosine_match(x, x, topk=topk, impl=impl), 0)
    agree(lambda impl: kernels.bipartite_match(x, num_protected=1, impl=impl), 0)


@types
def test_rows_as_wide_as_8192(dtype):
    x = tokens(13, dtype, 1, 5, 8192)
    agree(lambda impl: kernels.cosine_match(x, x, impl=impl)[0])
    agree(lambda impl: kernels.similarity_degree(x, impl=impl))
    agree(lambda impl: kernels.farthest_point(x, 3, start=torch.zeros(1, dtype=torch.int64, device=DEVICE), impl=impl))


@types_and_counts
@pytest.mark.parametrize(
    "options",
    [
        {"reduce": "mean"},
        {"reduce": "sum", "include_self": False},
        {"reduce": "sum", "threshold": 0.1},
        {"reduce": "count", "threshold": 0.1, "include_self": False},
    ],
    ids=str,
)
def test_similarity_degree(dtype, n, options):
    x = tokens(2, dtype, 2, n, 40)
    agree(lambda impl: kernels.similarity_degree(x, mask=mask_of(2, n), **options, impl=impl), 1e-4)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}, {"threshold": 0.1, "temperature": 0.1}], ids=str)
def test_similarity_propagate(options, transpose):
    x, y = tokens(3, torch.float32, 2, 65, 40), torch.rand(2, 65).to(DEVICE)
    agree(lambda impl: kernels.similarity_propagate(x, y, steps=2, transpose=transpose, **options, impl=impl), 1e-4)


@types_and_counts
@pytest.mark.parametrize("kind", ["plain", "causal", "blocks", "mixed"])
def test_received_attention(dtype, n, kind):
    q, k = tokens(4, dtype, 2, 4, n, 24), tokens(5, dtype, 2, 2, n, 24)
    segments = torch.randint(-1, 3, (2, n), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    segments = {"blocks": segments.sort(dim=-1).values, "mixed": segments}.get(kind)
    for reduce_heads in (True, False):
        agree(
            lambda impl, r=reduce_heads: kernels.received_attention(
                q, k, segments=segments, causal=kind in ("causal", "mixed"), reduce_heads=r, impl=impl
            )
        )


@types_and_counts
@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("softmax", [True, False])
def test_attention_rows(dtype, n, rows, softmax):
    q, k, mask = tokens(6, dtype, 2, 4, rows, 24), tokens(7, dtype, 2, 2, n, 24), mask_of(2, rows, n)
    for reduce_heads in (True, False):
        agree(
            lambda impl, r=reduce_heads: kernels.attention_rows(
                q, k, mask=mask, softmax=softmax, reduce_heads=r, impl=impl
            )
        )


@pytest.mark.parametrize("width", [40, 8], ids=["one-launch", "launch-per-step"])
@pytest.mark.parametrize("n", GREEDY_COUNTS)
def test_greedy_diversity_on_exact_ties(n, width):
    generator = torch.Generator().manual_seed(3)
    places = torch.rand(2, n, width, generator=generator).argsort(dim=-1)[..., :4]
    x = torch.zeros(2, n, width).scatter_(2, places, 1.0).to(DEVICE)
    mask, start = mask_of(2, n), torch.full((2,), n - 1, device=DEVICE)
    score = (torch.randint(0, 4, (2, n), generator=generator) / 4).to(DEVICE)
    initial = (torch.rand(2, n, generator=generator) < 0.2).to(DEVICE)
    for k in (1, 7):
        agree(lambda impl, k=k: kernels.farthest_point(x, k, mask=mask, impl=impl), 0)
    agree(lambda impl: kernels.farthest_point(x, 5, start=start, impl=impl), 0)
    agree(lambda impl: kernels.max_min(x, 5, mask=mask, initial=initial, weight=score, bonus=score, impl=impl), 0)
    agree(lambda impl: kernels.max_sum(x, 5, mask=mask, initial=initial, impl=impl), 0)
    agree(lambda impl: kernels.max_sum(x, 5, start=start, bonus=score, impl=impl), 0)


@pytest.mark.parametrize("width", [48, 24], ids=["one-launch", "launch-per-step"])
@types_and_counts
def test_dpp_map(n, dtype, width):
    x = torch.randn(2, n, width, generator=torch.Generator().manual_seed(8)).to(DEVICE, dtype)
    quality, mask = torch.linspace(0.5, 1, n, device=DEVICE).expand(2, n), mask_of(2, n)
    agree(lambda impl: kernels.dpp_map((x, quality), 12, mask=mask, impl=impl), 0)
    if dtype == torch.float32:
        kernel = x @ x.mT
        agree(lambda impl: kernels.dpp_map(kernel, 12, mask=mask, impl=impl), 0)


@types_and_counts
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_segment_merge(dtype, n, reduce):
    x = tokens(10, dtype, 2, n, 40)
    assignment = torch.randint(-1, 9, (2, n), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weights = torch.rand(2, n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # one rounding of the output
    for w in (None, weights):
        agree(
            lambda impl, w=w: kernels.segment_merge(x, assignment, 12, weights=w, reduce=reduce, impl=impl), tolerance
        )


@types
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_frame_similarity(dtype, frames):
    x = tokens(11, dtype, 2, frames, 13, 40)
    agree(lambda impl: kernels.frame_similarity(x, impl=impl))


@pytest.mark.parametrize("pairs", [0, 1, 6])
def test_temporal_match(pairs):
    similarity = torch.rand(2, pairs, 13, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    agree(lambda impl: kernels.temporal_match(similarity, 0.4, impl=impl), 0)


@types_and_counts
def test_compact(dtype, n):
    index = torch.randint(-1, n, (2, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    hidden = tokens(12, dtype, 2, n, 40)
    cos = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    ids = torch.arange(3 * n, device=DEVICE).view(3, 1, n) + 1
    mask = mask_of(2, 1, 5, n)
    agree(lambda impl: kernels.compact(index, hidden, impl=impl), 0)
    agree(lambda impl: kernels.compact(index, hidden, cos=cos, sin=-cos, position_ids=ids, mask=mask, impl=impl), 0)


def test_large_offsets_do_not_overflow():
    if IS_INTERPRETED:
        pytest.skip("needs more than 2**31 elements on the device")
    x = torch.zeros(1, 1, 1, device=DEVICE, dtype=torch.float16).expand(70000, 1, 1)
    big = torch.randn(2, 1, 4, device=DEVICE, dtype=torch.float16)
    strided = torch.empty_strided((2, 1, 4), (2**31 + 8, 4, 1), dtype=torch.float16, device=DEVICE).copy_(big)
    assert torch.equal(
        kernels.cosine_match(strided, strided, impl="triton")[1], torch.zeros_like(x[:2], dtype=torch.long)
    )
