"""Every operation against a float64 definition written here: drawn shapes, dtypes, masks, duplicates, zero vectors.

Two kinds of draws. Integer grids: entries in {-1, 0, 1} with exactly 4 non-zero ones (or none), so that every norm is 2
and every similarity a multiple of 1/4; ties are then exact and indices must be equal. Gaussian features in three
dtypes: indices may differ only where the float64 values are closer than the dtype's rounding.
"""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc.kernels as kernels

IMPLEMENTATIONS = ("reference", "torch")
both = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
sizes = st.sampled_from([1, 2, 3, 17, 63, 65])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


SMALL_BLOCKS = {
    "_cosine": {"TILE": 16, "SYMMETRIC_TILE": 16, "LEAST_TILE": 16, "LANES": 4, "WORKSPACE_BYTES": 1024},
    "attention_rows": {"ROW_BYTES": 1},
    "frame_similarity": {"WORKSPACE_BYTES": 1024},
    "received_attention": {"ROW_BYTES": 1, "LEAST_ROWS": 16},
    "segment_merge": {"BLOCK_BYTES": 1024},
    "similarity_degree": {"WORKSPACE_BYTES": 1024},
}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Blocks of 16 rows, so that the small drawn inputs span several."""
    with pytest.MonkeyPatch.context() as patch:
        for module, values in SMALL_BLOCKS.items():
            for name, value in values.items():
                patch.setattr(importlib.import_module(f"vtc.kernels.{module}"), name, value)
        yield


def generator(seed):
    return torch.Generator().manual_seed(seed)


def grid_tokens(seed, batch, count, width=9):
    """Rows with four entries of +-1 (norm 2); a few zero rows and duplicates, so that ties are exact and frequent."""
    source = generator(seed)
    places = torch.rand(batch, count, width, generator=source).argsort(dim=-1)[..., :4]
    signs = torch.randint(0, 2, (batch, count, 4), generator=source) * 2.0 - 1
    x = torch.zeros(batch, count, width).scatter_(2, places, signs)
    x[torch.rand(batch, count, generator=source) < 0.1] = 0
    copied = torch.randint(0, count, (batch, count), generator=source)
    is_copy = torch.rand(batch, count, generator=source) < 0.3
    return torch.where(is_copy[..., None], x.gather(1, copied[..., None].expand(-1, -1, width)), x)


def gaussian(seed, dtype, *shape):
    """Features of the dtype, some rows zero, laid out with a gap in memory when the seed is odd."""
    x = torch.randn(*shape, generator=generator(seed)).to(dtype)
    x[..., :: max(2, shape[-2] // 3), :] *= torch.tensor(0.0, dtype=dtype) if seed % 3 == 0 else 1
    if seed % 2:
        x = torch.stack([x, torch.full_like(x, 7)], dim=-1).flatten(-2)[..., ::2]
    return x


def drawn_mask(seed, *shape):
    return torch.rand(*shape, generator=generator(seed + 1)) < (0.0 if seed % 7 == 0 else 0.7)


def cosines(x, y):
    """cos in float64; zero vectors have similarity 0."""
    x, y = x.double(), y.double()
    norms = x.norm(dim=-1)[..., :, None] * y.norm(dim=-1)[..., None, :]
    return torch.where(norms > 0, x @ y.mT / norms.clamp(min=1e-300), 0.0)


def self_cosines(x):
    s = cosines(x, x)
    own = (x.double().norm(dim=-1) > 0).double()
    return s - torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed(own)


def assert_near(result, expected, tolerance=2e-6):
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected.double(), atol=tolerance, rtol=1e-5)


def greedy(distance_of, available, k, first=None):
    """Greedy selection by plain Python: `distance_of(picked)` scores all tokens of one sample."""
    picked, free = [], set(torch.nonzero(available).flatten().tolist())
    while len(picked) < k and free:
        score = distance_of(picked).tolist()
        best = first if first is not None and not picked else min(free, key=lambda i: (-score[i], i))
        picked.append(best)
        free.remove(best)
    return picked + [-1] * (k - len(picked))


@both
@few
@given(seed=seeds, batch=st.sampled_from([1, 2]), n=sizes, m=sizes, topk=st.sampled_from([1, 2, 5]))
def test_cosine_match_breaks_exact_ties_to_the_lowest_index(impl, seed, batch, n, m, topk):
    source, target = grid_tokens(seed, batch, n), grid_tokens(seed + 1, batch, m)
    source_mask, target_mask = drawn_mask(seed, batch, n), drawn_mask(seed + 2, batch, m)
    values, index = kernels.cosine_match(
        source, target, source_mask=source_mask, target_mask=target_mask, topk=topk, impl=impl
    )
    s = cosines(source, target)
    for b in range(batch):
        valid = torch.nonzero(target_mask[b]).flatten().tolist()
        for i in range(n):
            ranked = sorted(valid, key=lambda j: (-s[b, i, j].item(), j))[:topk]
            pad = topk - len(ranked)
            expected = ranked + [-1] * pad if source_mask[b, i] else [-1] * topk
            value = [s[b, i, j].item() for j in ranked] + [-math.inf] * pad if source_mask[b, i] else [0.0] * topk
            assert index[b, i].tolist() == expected
            assert_near(values[b, i], torch.tensor(value))


@both
@few
@given(seed=seeds, dtype=dtypes, n=sizes, m=sizes)
def test_cosine_match_finds_the_best_target_in_every_dtype(impl, seed, dtype, n, m):
    source, target = gaussian(seed, dtype, 2, n, 24), gaussian(seed + 1, dtype, 2, m, 24)
    values, index = kernels.cosine_match(source, target, impl=impl)
    s = cosines(source, target)
    assert_near(values[..., 0], s.amax(dim=-1))
    assert_near(s.gather(2, index)[..., 0].float(), s.amax(dim=-1))


@both
def test_rows_as_wide_as_8192(impl):
    x = gaussian(4, torch.bfloat16, 1, 5, 8192)
    s = cosines(x, x)[0]
    assert_near(kernels.cosine_match(x, x, impl=impl)[0][0, :, 0], s.amax(dim=-1))
    assert_near(kernels.similarity_degree(x, impl=impl)[0], s.sum(dim=-1), tolerance=1e-5)
    assert_near(
        kernels.similarity_propagate(x, x[..., 0].float(), steps=2, threshold=-1.0, impl=impl)[0],
        s @ s @ x[0, :, 0].double(),
        tolerance=1e-5,
    )
    assert kernels.farthest_point(x, 5, impl=impl)[0].unique().numel() == 5


@both
@few
@given(seed=seeds, n=sizes, num_protected=st.sampled_from([0, 1, 2]))
def test_bipartite_match_is_the_alternate_split(impl, seed, n, num_protected):
    x, mask = grid_tokens(seed, 2, n), drawn_mask(seed, 2, n)
    values, index = kernels.bipartite_match(x, num_protected=num_protected, mask=mask, impl=impl)
    assert values.shape == (2, (n + 1) // 2)
    s = cosines(x, x)
    for b in range(2):
        free = [i for i in range(n) if i >= num_protected and mask[b, i]]
        for source in range(0, n, 2):
            targets = [j for j in free if j % 2] if source in free else []
            best = min(targets, key=lambda j: (-s[b, source, j].item(), j), default=-1)
            assert index[b, source // 2] == (best // 2 if best >= 0 else -1)
            assert values[b, source // 2] == (s[b, source, best].float() if best >= 0 else -math.inf)


@both
@few
@given(
    seed=seeds,
    dtype=dtypes,
    n=sizes,
    reduce=st.sampled_from(["sum", "mean", "count"]),
    threshold=st.sampled_from([None, 0.2]),
    include_self=st.booleans(),
)
def test_similarity_degree(impl, seed, dtype, n, reduce, threshold, include_self):
    threshold = 0.2 if reduce == "count" else threshold
    x, mask = gaussian(seed, dtype, 2, n, 24), drawn_mask(seed, 2, n)
    s = self_cosines(x)
    if threshold is not None and (s - threshold).abs().min() < 1e-5:
        return
    degree = kernels.similarity_degree(
        x, mask=mask, reduce=reduce, threshold=threshold, include_self=include_self, impl=impl
    )
    kept = mask[:, None] & mask[..., None] & (include_self | ~torch.eye(n, dtype=torch.bool))
    if threshold is not None:
        kept = kept & (s >= threshold)
    expected = (kept * (1.0 if reduce == "count" else s)).sum(dim=-1)
    if reduce == "mean":
        expected = expected / (mask.sum(dim=-1, keepdim=True) - (0 if include_self else 1)).clamp(min=1)
    assert_near(degree, expected, tolerance=1e-4)  # sums of up to 65 terms


@both
@few
@given(
    seed=seeds,
    dtype=dtypes,
    n=sizes,
    threshold=st.sampled_from([None, 0.2]),
    temperature=st.sampled_from([None, 0.03, 1.0]),
    steps=st.sampled_from([0, 1, 3]),
    transpose=st.booleans(),
)
def test_similarity_propagate(impl, seed, dtype, n, threshold, temperature, steps, transpose):
    x, mask = gaussian(seed, dtype, 2, n, 24), drawn_mask(seed, 2, n)
    y = torch.rand(2, n, generator=generator(seed))
    s = self_cosines(x)
    if threshold is not None and (s - threshold).abs().min() < 1e-5:
        return
    result = kernels.similarity_propagate(
        x, y, mask=mask, threshold=threshold, temperature=temperature, steps=steps, transpose=transpose, impl=impl
    )
    valid = mask if temperature is None else mask & (x != 0).any(dim=-1)
    edge = valid[:, None] & valid[..., None]
    if threshold is not None:
        edge = edge & (s >= threshold)
    weight = torch.where(edge, s if temperature is None else (s / temperature).exp(), 0.0)
    if temperature is not None:
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    expected = torch.where(mask, y.double(), 0.0)
    for _ in range(steps):
        expected = ((weight.mT if transpose else weight) @ expected[..., None])[..., 0]
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result.double(), expected, atol=2e-5 * scale, rtol=2e-5)


@both
@few
@given(
    seed=seeds,
    dtype=dtypes,
    n=sizes,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2)]),
    is_segmented=st.booleans(),
    causal=st.booleans(),
    reduce_heads=st.booleans(),
)
def test_received_attention(impl, seed, dtype, n, heads, is_segmented, causal, reduce_heads):
    q, k = gaussian(seed, dtype, 2, heads[0], n, 8), gaussian(seed + 1, dtype, 2, heads[1], n, 8)
    segments = torch.randint(-1, 3, (2, n), generator=generator(seed)) if is_segmented else None
    received = kernels.received_attention(q, k, segments=segments, causal=causal, reduce_heads=reduce_heads, impl=impl)
    expected = torch.zeros(2, heads[0], n, dtype=torch.float64)
    for b in range(2):
        ids = [0] * n if segments is None else segments[b].tolist()
        for h in range(heads[0]):
            logits = q[b, h].double() @ k[b, h * heads[1] // heads[0]].double().T / 8**0.5
            for i in range(n):
                keys = [j for j in range(n) if ids[j] == ids[i] >= 0 and (j <= i or not causal)]
                if keys:
                    expected[b, h, keys] += torch.softmax(logits[i, keys], dim=0) / ids.count(ids[i])
    assert_near(received, expected.mean(dim=1) if reduce_heads else expected, tolerance=1e-5)


def test_received_attention_sums_to_one_without_segments():
    q = gaussian(3, torch.float32, 2, 4, 65, 8)
    torch.testing.assert_close(kernels.received_attention(q, q).sum(dim=-1), torch.ones(2))


@both
@few
@given(
    seed=seeds,
    dtype=dtypes,
    n=sizes,
    rows=st.sampled_from([1, 3, 20]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2)]),
    mask_kind=st.sampled_from(["none", "keys", "rows"]),
    softmax=st.booleans(),
    reduce_heads=st.booleans(),
)
def test_attention_rows(impl, seed, dtype, n, rows, heads, mask_kind, softmax, reduce_heads):
    q, k = gaussian(seed, dtype, 2, heads[0], rows, 8), gaussian(seed + 1, dtype, 2, heads[1], n, 8)
    shape = {"none": None, "keys": (2, n), "rows": (2, rows, n)}[mask_kind]
    mask = None if shape is None else drawn_mask(seed, *shape)
    out = kernels.attention_rows(q, k, mask=mask, softmax=softmax, reduce_heads=reduce_heads, impl=impl)
    keys = k.double()[:, torch.arange(heads[0]) * heads[1] // heads[0]]
    logits = q.double() @ keys.mT / 8**0.5
    seen = torch.ones(2, 1, 1, n, dtype=torch.bool)
    if mask is not None:
        seen = mask[:, None, None] if mask_kind == "keys" else mask[:, None]
    expected = logits.masked_fill(~seen, -math.inf)
    if softmax:
        weight = torch.where(seen, (logits - logits.amax(dim=-1, keepdim=True)).exp(), 0.0)
        expected = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    assert_near(out, expected.mean(dim=1) if reduce_heads else expected, tolerance=1e-5)


@both
@few
@given(seed=seeds, n=sizes, k=st.sampled_from([0, 1, 4, 70]), has_start=st.booleans())
def test_farthest_point_on_exact_ties(impl, seed, n, k, has_start):
    x, mask = grid_tokens(seed, 2, n), drawn_mask(seed, 2, n)
    start = None
    if has_start:
        start = torch.stack([m.nonzero()[-1, 0] if m.any() else torch.tensor(0) for m in mask])
    picks = kernels.farthest_point(x, k, mask=mask, start=start, impl=impl)
    s = cosines(x, x)
    for b in range(2):

        def distance(picked, b=b):
            seen = picked or torch.nonzero(mask[b]).flatten().tolist()
            far = 1 - torch.stack(
                [s[b, i, [j for j in seen if j != i] or [i]].max() for i in range(n)] if seen else [s[b, 0, 0]] * n
            )
            return far if picked or len(seen) > 1 else torch.full((n,), 2.0)

        first = None if start is None or not mask[b].any() else start[b].item()
        assert picks[b].tolist() == greedy(distance, mask[b], k, first)


@both
@few
@given(seed=seeds, n=sizes, is_sum=st.booleans(), has_initial=st.booleans())
def test_scored_dispersion_on_exact_ties(impl, seed, n, is_sum, has_initial):
    x, mask = grid_tokens(seed, 2, n), drawn_mask(seed, 2, n)
    weight = torch.randint(1, 3, (2, n), generator=generator(seed)).float()
    bonus = torch.randint(0, 4, (2, n), generator=generator(seed + 1)) / 4
    initial = torch.rand(2, n, generator=generator(seed + 2)) < 0.2 if has_initial else None
    select = kernels.max_sum if is_sum else kernels.max_min
    picks = select(x, 5, mask=mask, initial=initial, weight=weight, bonus=bonus, impl=impl)
    distances = 1 - cosines(x, x)
    for b in range(2):
        given_set = [] if initial is None else torch.nonzero(initial[b] & mask[b]).flatten().tolist()
        valid = torch.nonzero(mask[b]).flatten().tolist()

        def objective(picked, b=b, given_set=given_set, valid=valid):
            seen = given_set + picked or valid
            score = []
            for i in range(n):
                others = [distances[b, i, j].item() for j in seen if j != i]
                score.append(sum(others) if is_sum else min(others, default=2.0))
            return torch.tensor(score) * weight[b] + bonus[b]

        available = mask[b] & ~torch.isin(torch.arange(n), torch.tensor(given_set, dtype=torch.int64))
        assert picks[b].tolist() == greedy(objective, available, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_pick_is_within_rounding_of_the_best(dtype):
    x = gaussian(5, dtype, 1, 65, 24)
    distances = 1 - cosines(x, x)[0]
    picks = kernels.farthest_point(x, 20, impl="torch")[0].tolist()
    for step in range(1, 20):
        nearest = distances[:, picks[:step]].amin(dim=1)
        nearest[picks[:step]] = -1
        assert nearest[picks[step]] >= nearest.max() - 1e-6


@both
@few
@given(seed=seeds, n=sizes, k=st.sampled_from([0, 1, 6, 70]), is_explicit=st.booleans())
def test_dpp_map_maximises_the_determinant_greedily(impl, seed, n, k, is_explicit):
    x, mask = torch.randn(2, n, 80, generator=generator(seed)), drawn_mask(seed, 2, n)
    quality = 0.5 + torch.rand(2, n, generator=generator(seed + 1))
    kernel = quality.double()[:, :, None] * cosines(x, x) * quality.double()[:, None]
    picks = kernels.dpp_map(kernel.float() if is_explicit else (x, quality), k, mask=mask, impl=impl)
    for b in range(2):
        chosen = [p for p in picks[b].tolist() if p >= 0]
        assert len(set(chosen)) == len(chosen) == min(k, int(mask[b].sum()))
        assert all(mask[b, chosen])
        for step in range(min(len(chosen), 6)):
            rest = [i for i in torch.nonzero(mask[b]).flatten().tolist() if i not in chosen[:step]]
            sets = {i: [*chosen[:step], i] for i in rest}
            gain = {i: torch.logdet(kernel[b][members][:, members]).item() for i, members in sets.items()}
            assert gain[chosen[step]] >= max(gain.values()) - 1e-5


@both
def test_dpp_map_goes_on_when_the_rank_is_exhausted(impl):
    x = torch.eye(3)[None, [0, 0, 1, 1, 2, 2]]
    picks = kernels.dpp_map((x, torch.ones(1, 6)), 6, impl=impl)[0].tolist()
    assert picks == [0, 2, 4, 1, 3, 5]


@both
@few
@given(
    seed=seeds,
    dtype=dtypes,
    n=sizes,
    slots=st.sampled_from([0, 1, 7]),
    has_weights=st.booleans(),
    reduce=st.sampled_from(["mean", "sum"]),
)
def test_segment_merge(impl, seed, dtype, n, slots, has_weights, reduce):
    x = gaussian(seed, dtype, 2, n, 12)
    assignment = torch.randint(-1, max(1, slots), (2, n), generator=generator(seed))
    weights = torch.rand(2, n, generator=generator(seed)) if has_weights else None
    merged = kernels.segment_merge(x, assignment, slots, weights=weights, reduce=reduce, impl=impl)
    assert merged.dtype == dtype
    expected = torch.zeros(2, slots, 12, dtype=torch.float64)
    for b in range(2):
        for slot in range(slots):
            members = torch.nonzero(assignment[b] == slot).flatten()
            w = torch.ones(len(members), dtype=torch.float64) if weights is None else weights[b, members].double()
            total = (w[:, None] * x[b, members].double()).sum(dim=0)
            expected[b, slot] = total / w.sum() if reduce == "mean" and len(members) else total
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]  # one rounding of the output
    torch.testing.assert_close(merged.double(), expected, atol=tolerance, rtol=tolerance)


@both
@few
@given(seed=seeds, dtype=dtypes, frames=st.sampled_from([1, 2, 5]), places=sizes)
def test_frame_similarity_and_the_runs_it_gives(impl, seed, dtype, frames, places):
    x = gaussian(seed, dtype, 2, frames, places, 10)
    similarity = kernels.frame_similarity(x, impl=impl)
    pairs = cosines(x[:, :-1].transpose(1, 2), x[:, 1:].transpose(1, 2)).diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    assert_near(similarity, pairs)
    start = kernels.temporal_match(similarity, 0.1, impl=impl)
    for b in range(2):
        for place in range(places):
            run = 0
            for t in range(frames):
                run = run if t == 0 or similarity[b, t - 1, place] >= 0.1 else t
                assert start[b, t, place] == run


@both
@few
@given(seed=seeds, n=sizes, kept=st.sampled_from([0, 1, 9]), axes=st.sampled_from([(), (3,)]), is_shared=st.booleans())
def test_compact(impl, seed, n, kept, axes, is_shared):
    index = torch.randint(-1, n, (2, kept), generator=generator(seed))
    hidden = gaussian(seed, torch.float32, 2, n, 6)
    cos = torch.randn(1 if is_shared else 2, n, 4, generator=generator(seed))
    ids = torch.randint(1, 99, (*axes, 1 if is_shared else 2, n), generator=generator(seed))
    mask = torch.rand(2, 1, 5, n, generator=generator(seed)) < 0.5
    out = kernels.compact(index, hidden, cos=cos, sin=None, position_ids=ids, mask=mask, impl=impl)
    assert out.sin is None
    assert out.position_ids.shape == (*axes, 2, kept)
    for b in range(2):
        for j, token in enumerate(index[b].tolist()):
            shared = 0 if is_shared else b
            assert torch.equal(out.hidden[b, j], hidden[b, token] if token >= 0 else torch.zeros(6))
            assert torch.equal(out.cos[b, j], cos[shared, token] if token >= 0 else torch.zeros(4))
            expected = ids[..., shared, token] if token >= 0 else torch.zeros(axes, dtype=torch.int64)
            assert torch.equal(out.position_ids[..., b, j], expected)
            assert torch.equal(out.mask[b, 0, :, j], mask[b, 0, :, token] & (token >= 0))
