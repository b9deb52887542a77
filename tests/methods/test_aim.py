"""AIM against the authors' code: merging, PageRank, a whole run; its schedule, and frames with separators."""

from functools import partial
from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.primitives import attention_pagerank, settled
from vtc.stages import Signal, Site, Stage
from vtc.testing import GivenStages, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.end_to_end import replay
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout

cases = partial(golden_cases, "aim", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", cases(kind="merge"), ids=str)
@pytest.mark.parametrize("as_frames", [False, True], ids=["images", "frames"])
def test_golden_merge(case, as_frames):
    """Frames as groups of their own, and as segments of one video."""
    x, (frames, number) = case["x"], case["x"].shape[:2]
    for level in ("y1", "y2"):
        expected = case[level]
        count = expected.shape[1]
        method = vtc.create("aim", variant="reference")
        stage = method.stages()[0]
        if as_frames:
            layout = Layout.grid(1, number, segments=frames)
            token_map = stage.decide(vtc.Tokens.of(x.flatten(0, 1)[None], count * frames, layout))
            y = token_map.apply(x.flatten(0, 1)[None]).unflatten(1, (frames, count))[0]
        else:
            token_map = stage.decide(vtc.Tokens.of(x, count))
            y = token_map.apply(x)
            # the default differs in the order alone
            own = vtc.create("aim").stages()[0].decide(vtc.Tokens.of(x, count)).apply(x)
            distance = torch.cdist(own, expected, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distance.amin(2).max()) < 1e-4 and float(distance.amin(1).max()) < 1e-4
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases(kind="pagerank"), ids=str)
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "again"])
def test_golden_pagerank(case, stored, monkeypatch):
    import vtc.primitives.pagerank as pagerank

    monkeypatch.setattr(pagerank, "ROWS", 7)
    if not stored:
        monkeypatch.setattr(pagerank, "BLOCK_BYTES", 0)
    logits = case["logits"]
    length = logits.shape[-1]
    # queries that are the logits, keys that are unit vectors
    queries = logits.masked_fill(logits < -1e30, 0)
    keys = torch.eye(length).expand(logits.shape[0], 1, -1, -1)
    valid = torch.ones(logits.shape[0], length, dtype=torch.bool)
    options = {"temperature": case.number("tau"), "steps": case.number("iters"), "scale": 1.0}
    score = attention_pagerank(queries, keys, valid, **options)
    torch.testing.assert_close(score, case["importance"], atol=1e-6, rtol=1e-4)
    # padding in front changes nothing
    padded = torch.nn.functional.pad(queries, (0, 0, 3, 0))
    padded = attention_pagerank(
        padded,
        torch.nn.functional.pad(keys, (0, 0, 3, 0)),
        torch.nn.functional.pad(valid, (3, 0)),
        **options,
    )
    assert bool((padded[:, :3] == 0).all())
    torch.testing.assert_close(padded[:, 3:], case["importance"], atol=1e-6, rtol=1e-4)


def qwen2(case):
    """The recorded model and prompt; the layer behind which its first cut is, and how many layers cut."""
    first, second, _ = case["boundaries"].tolist()
    run = replay(
        case,
        (first, second),
        [case["decode_x"]],
        model_type="qwen2",
        num_attention_heads=case.number("num_heads"),
        num_key_value_heads=case.number("num_kv_heads"),
        rope_theta=case.number("rope_theta"),
        rms_norm_eps=case.number("rms_eps"),
    )
    return run, case.number("prune_start_layer"), round(1 / case.number("rate_step"))


def holds(cache, layer):
    """What the cache of `layer` holds of the recorded prompt."""
    return cache._vtc.layers[layer].column[0].tolist()


@pytest.mark.parametrize("case", cases(kind="qwen2"), ids=str)
def test_golden_choice(case):
    run, start, cuts = qwen2(case)
    expected = [row.nonzero().flatten().tolist() for row in case["masks_after_layer"]]
    with vtc.compress(run.model, vtc.create("aim", budget=1.0, layer=start + 1, last=start + cuts)) as handle:
        cache = names.cache_of(run.prefill(handle))
    for layer in range(1, start + 3):
        assert holds(cache, layer) == expected[layer - 1]
    # there masked rows go on and start with their share; that turns round the two that the third cut lies between
    ours, theirs = set(holds(cache, start + 3)), set(expected[start + 2])
    assert len(ours) == len(theirs) and len(ours - theirs) == 1
    score = case["importance"][start + 2]
    (won,), (lost,) = ours - theirs, theirs - ours
    between = [i for i in expected[start + 1] if score[won] < score[i] < score[lost]]
    assert between == []


@pytest.mark.parametrize("case", cases(kind="qwen2"), ids=str)
def test_golden_end_to_end(case):
    run, start, _ = qwen2(case)
    masks = case["masks_after_layer"]
    stages = tuple(
        Stage(
            Site("layer", layer),
            lambda tokens, mask=masks[layer - 1]: mask[tokens.signal("position")[0]].nonzero().T,
            compress=settled(),
            signals=(Signal("position"),),
            budget=vtc.Budget(ratio=1.0),
        )
        for layer in range(start + 1, len(masks))
    )
    with vtc.compress(run.model, GivenStages(given=stages), positions="original") as handle:
        out = run.prefill(handle)
        cache = names.cache_of(out)
        for layer in range(1, len(masks)):
            assert holds(cache, layer) == masks[layer - 1].nonzero().flatten().tolist()
        kept = torch.tensor(holds(cache, len(masks) - 1))
        torch.testing.assert_close(out.last_hidden_state[0, kept], case["last_hidden"][kept], atol=1e-5, rtol=1e-5)
        hidden = run.decode(0, cache).last_hidden_state[0]
        torch.testing.assert_close(hidden, case["decode_hidden"], atol=1e-5, rtol=1e-5)


def test_the_schedule_falls_to_nothing():
    # 28 layers: all in layer 14, an eighth less from layer 15 on, none from layer 22 on
    published = [147, 126, 105, 84, 63, 42, 21, 0, 0, 0, 0, 0, 0]
    assert [vtc.create("aim").pace(196, 168, step, 13) for step in range(13)] == published
    assert [vtc.create("aim", layer=15, last=22).pace(196, 168, step, 13) for step in range(13)] == published
    assert [vtc.create("aim", layer=2, last=3).pace(64, 30, step, 2) for step in range(2)] == [15, 0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", ["aim@1:1.0(last=3)", "aim@1:1.0(last=9)", "aim:1.0"])
def test_pruning_equals_the_masked_model(spec, implementation):
    """Two images, none, padding; down to no visual token at all, and on with the answer."""
    llava = tiny("llava", implementation)
    inputs = llava.inputs(PROMPTS)
    with vtc.compress(llava.model, spec, positions="original") as handle, torch.no_grad():
        out = llava.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        report = handle.report
    per_layer = {
        "aim@1:1.0(last=3)": ((16, 32, 0), (10, 21, 0), (5, 10, 0), (0, 0, 0)),
        "aim@1:1.0(last=9)": ((16, 32, 0), (14, 28, 0), (12, 24, 0), (10, 21, 0)),
        "aim:1.0": ((16, 32, 0), (16, 32, 0), (0, 0, 0), (0, 0, 0)),
    }
    assert report.per_layer == per_layer[spec] == report.kv_tokens
    length, dense = inputs["input_ids"].shape[1], out.sequences.shape[1] - 1 - inputs["input_ids"].shape[1]
    full = {
        **inputs,
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, dense), value=1),
    }
    expected = masked_logits(llava.model, full, visible_columns(names.cache_of(out), length, dense))
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < 1e-5


def test_merging_alone():
    llava = tiny("llava")
    with vtc.compress(llava.model, "aim:5(prune=false)") as handle, torch.no_grad():
        llava.model(**llava.inputs(PROMPTS))
        assert set(handle.report.per_layer) == {(5, 10, 0)}
        sizes = handle.report.token_map.sizes()
    assert sizes.sum(1).tolist() == [16.0] * 3


def frames_with_separators():
    """Two groups: three frames of 3 x 3 with a separator behind each, and one frame of 2 x 3 and its separator."""
    parts = []
    for frames, (height, width), total in ((3, (3, 3), 30), (1, (2, 3), 30)):
        one = Layout.grid(height, width)
        rows = []
        for frame in range(frames):
            rows.append(torch.stack([one.row[0], one.col[0], torch.full_like(one.row[0], frame)]))
            rows.append(torch.full((3, 1), -1))
        joined = torch.cat(rows, dim=1)
        parts.append(torch.nn.functional.pad(joined, (0, total - joined.shape[1]), value=-1))
    row, col, segment = torch.stack(parts, dim=1)
    layout = Layout(row, col, segment, (((3, 3),) * 3, ((2, 3),)))
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    return x, (30, 7), layout


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("budget", [(15, 4), (6, 2), (5, 1), (1, 6), (29, 7)])
def test_frames_stay_apart_and_separators_alone(budget, variant):
    x, lengths, layout = frames_with_separators()
    tokens = vtc.Tokens(x, lengths, layout, budget=budget)
    token_map = vtc.create("aim", variant=variant).stages()[0].decide(tokens)
    assert token_map.lengths == budget
    matrix = token_map.matrix()
    for b, (frames, count) in enumerate(zip((3, 1), budget, strict=True)):
        weight = matrix[b, :count, : lengths[b]]
        torch.testing.assert_close(weight.sum(1), torch.ones(count))
        assert bool(((weight > 0).sum(0) == 1).all()), "every token goes into one slot"
        separators = (layout.row[b, : lengths[b]] < 0).nonzero().flatten()
        if count < 2 * frames:
            continue  # more frames and separators than places: all together
        for slot in weight:
            members = (slot > 0).nonzero().flatten()
            assert len(layout.segment[b, members].unique()) == 1
        assert bool(torch.isin(separators, token_map.anchor[b]).all()), "separators stay"
        assert bool((weight[:, separators].max(0).values == 1).all())
        counts = [int((layout.segment[b, token_map.anchor[b, :count]] == f).sum()) for f in range(frames)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": -1}, "layer=-1"),
        ({"layer": 5, "last": 4}, "last=4"),
        ({"last": 4}, "not without it"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"variant": "code"}, "variant='code'"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(errors.SpecError, match=says):
        vtc.create("aim", budget=8, **options)
