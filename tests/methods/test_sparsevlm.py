"""SparseVLM and SparseVLM+ against the authors' code, their schedules and counts, and options that cannot be."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.methods.sparsevlm import SparseVLM
from vtc.primitives import density_peaks
from vtc.stages import Signal, Site, Stage
from vtc.testing import GivenStages, tiny
from vtc.testing.conformance import AXES, draw_tokens
from vtc.testing.end_to_end import replay
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS

FOLDER = Path(__file__).parents[1] / "golden"
cases = partial(golden_cases, "sparsevlm", FOLDER)
#: the published code adds noise of this size to densities
NOISE = 1e-6


@pytest.mark.parametrize("case", cases(kind="cluster"), ids=str)
def test_golden_clusters(case):
    x, count = case["x"], case.number("cluster_num")
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    noise = case["density_noise"] * NOISE
    centers, cluster = density_peaks(x, mask, [count], neighbours=[count], noise=noise)
    assert torch.equal(cluster[0, centers[0]], torch.arange(count))
    merged = torch.stack([x[0, cluster[0] == c].mean(0) for c in range(count)])
    torch.testing.assert_close(merged[None], case["merged"], atol=1e-5, rtol=1e-5)


def tokens_of(attention, raters, budget):
    """Tokens of which the text tokens `raters` are close to the visual ones."""
    number, total = attention.shape
    text = torch.zeros(1, number, 4)
    text[0, raters, 0] = 1.0
    visual = torch.zeros(1, total, 4)
    visual[..., 0] = 1.0
    yes = torch.ones(1, number, dtype=torch.bool)
    return vtc.Tokens.of(
        visual,
        budget,
        text_attention=attention[None],
        text_embeds=text,
        text_mask=yes,
        text_after=yes,
        visual_embeds=visual,
        visual_mask=torch.ones(1, total, dtype=torch.bool),
    )


@pytest.mark.parametrize("case", cases(kind="rank_v10"), ids=str)
def test_golden_rank_rule(case):
    tokens = tokens_of(case["text_to_visual"], case["rater_offsets"], budget=100)
    options = {"scale": case.number("scale"), "bias": case.number("bias"), "variant": "reference", "rule": "rank"}
    method = vtc.create("sparsevlm", recycle=0.0, **options)
    assert method.raters(tokens)[0].nonzero().flatten().tolist() == case["rater_offsets"].tolist()
    torch.testing.assert_close(method.score(tokens), case["score"], atol=1e-6, rtol=1e-5)
    assert method.ranked(tokens).item() == case.number("kept")
    kept = method.stages()[0].decide(tokens).anchor[0]
    assert torch.equal(kept, case["mask"][0].nonzero().flatten())


@pytest.mark.parametrize("case", cases(kind="v"), ids=str)
def test_golden_end_to_end(case):
    start, count = case.number("image_start"), case.number("image_len")
    heads, length = case.number("num_heads"), case["inputs_embeds"].shape[1]
    (layer,) = case["pruning_loc"].tolist()
    mask = case["prune0_mask"][0]
    recycles = "density_noise0" in case
    slug = "sparsevlm" if recycles else "sparsevlm-plus"
    method = vtc.create(slug, layers=(layer + 1,), counts=(int(mask.sum()),), variant="reference")
    (stage,) = method.stages()
    seen = []

    def filter(tokens):
        seen.append(tokens)
        return stage.filter(tokens)

    def correlate(tokens, keep):
        return method.correlate(tokens, keep, noise=case["density_noise0"] * NOISE)

    stage = dataclasses.replace(stage, filter=filter, correlate=correlate if recycles else None)
    run = replay(
        case, (start, start + count), list(case["decode_embeds"]), num_attention_heads=heads, num_key_value_heads=heads
    )
    given = GivenStages(given=(stage,))
    stage = method.stages()[0]
    with vtc.compress(run.model, given, positions=method.positions) as handle:
        out = run.prefill(handle)
        cache = names.cache_of(out)
        # offsets are counted behind the image; text before it comes first here
        raters = method.raters(seen[0])[0].nonzero().flatten() - start
        assert torch.equal(raters, case["text_rater_offsets"])
        score = method.score(seen[0])
        torch.testing.assert_close(score / score.sum(), case["prune0_score"] / case["prune0_score"].sum())
        assert torch.equal(stage.filter(seen[0])[0], mask.nonzero().flatten())
        assert [layer.keys.shape[2] for layer in cache.layers] == case["prefill_cache_len_per_layer"].tolist()
        last = cache._vtc.layers[-1].column[0]
        assert last[:start].tolist() == list(range(start)) and int(last[-1]) == length - 1
        torch.testing.assert_close(out.last_hidden_state[:, last], case["prefill_last_hidden"], atol=1e-5, rtol=1e-5)
        for step, expected in enumerate(case["decode_last_hidden"]):
            hidden = run.decode(step, cache).last_hidden_state
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def counts(method, total):
    """Tokens that stay after each cut, of `total`."""
    return tuple(stage.schedule(total, *method.budget_for(stage).resolve((total,))) for stage in method.stages())


@pytest.mark.parametrize("slug", ["sparsevlm", "sparsevlm-plus"])
def test_published_lists(slug):
    for name, row in type(vtc.create(slug)).lists.items():
        reference = vtc.create(slug, budget=name, variant="reference")
        assert counts(reference, 576) == row
        totals = counts(vtc.create(slug, budget=name), 576)
        # the budget's name is the average over 32 layers, with the layer before a cut counted as cut
        assert abs((2 * 576 + 4 * totals[0] + 9 * totals[1] + 17 * totals[2]) / 32 - name) < 1
        assert counts(vtc.create(slug, budget=totals[-1], convention="final"), 576) == totals
        assert counts(vtc.create(slug, budget=2 * name), 1152) == tuple(2 * count for count in totals)
        # as many stay as published, and the clusters of the rest come back
        for have, total, kept in zip((576, *totals), totals, row, strict=False):
            assert reference._split(have, total) == (kept, total - kept)


@pytest.mark.parametrize("convention", ["average", "final"])
@pytest.mark.parametrize("total", [16, 100, 576, 2880])
def test_schedules_fall_and_follow_the_budget(total, convention):
    before = (0, 0, 0)
    for budget in range(1, total + 1, max(1, total // 40)):
        now = counts(vtc.create("sparsevlm", budget=budget, convention=convention), total)
        assert list(now) == sorted(now, reverse=True) and now[-1] >= 1
        assert now[-1] >= before[-1]
        assert convention == "average" or now[-1] == budget
        before = now
    assert counts(vtc.create("sparsevlm", budget=total, convention=convention), total) == (total,) * 3


def test_other_numbers_of_cuts():
    assert counts(vtc.create("sparsevlm", budget=36, layers=(2, 4), convention="final"), 576) == (144, 36)
    assert counts(vtc.create("sparsevlm", layers=(2, 4), counts=(90, 20)), 576) == (90, 20)
    assert counts(vtc.create("sparsevlm", budget=30, layers=(2, 4), counts=(90, 20)), 576) == (90, 30)


@pytest.mark.parametrize("total", [2, 9, 64, 577])
def test_recycled_tokens_are_part_of_the_budget(total):
    method = SparseVLM()
    for budget in range(1, total + 1):
        kept, clusters = method._split(total, budget)
        assert kept + clusters == budget and kept >= 1
        if kept > 1 or budget == 1 + clusters:
            assert clusters == method._clusters(total - kept) or kept == 1
    assert method._split(100, 66 + 2) == (66, 2)  # the published counts of the recorded run


def drawn(method, lengths=(40, 17, 9), budget=8, **axes):
    (stage, *_) = method.stages()
    return stage, draw_tokens(stage, lengths, budget, axes={**AXES, **axes})


def test_clusters_stand_behind_what_stays_or_at_their_own_place():
    maps = {}
    for place in ("end", "own"):
        method = vtc.create("sparsevlm", place=place)
        stage, tokens = drawn(method)
        maps[place] = stage.decide(tokens)
        keep = method.filter(tokens)
        stays = (keep >= 0).sum(1).tolist()
        x = maps[place].apply(tokens.x)
        anchor = maps[place].anchor
        for b, kept in enumerate(stays):
            row = anchor[b, : maps[place].lengths[b]]
            assert torch.equal(row, row.sort().values)
            if place == "end":
                torch.testing.assert_close(x[b, :kept], tokens.x[b, keep[b, :kept]])
            else:
                at = torch.isin(row, keep[b, :kept])
                torch.testing.assert_close(x[b, : len(row)][at], tokens.x[b, keep[b, :kept]])
    for b in range(3):
        a, c = (maps[place].apply(tokens.x)[b, : maps[place].lengths[b]] for place in ("end", "own"))
        torch.testing.assert_close(a.sum(0), c.sum(0))


def test_means_cover_the_best_of_what_is_dropped():
    method = vtc.create("sparsevlm")
    stage, tokens = drawn(method)
    token_map = stage.decide(tokens)
    score, sources = method.score(tokens), token_map.sources()
    for b, n in enumerate(tokens.lengths):
        kept, _ = method._split(n, tokens.budget[b])
        pool = method._pool(n - kept)
        order = score[b, :n].argsort(descending=True, stable=True)
        assert bool((sources[b, order[: kept + pool]] >= 0).all())
        assert bool((sources[b, order[kept + pool :]] == -1).all())
        weight = token_map.matrix()[b, : token_map.lengths[b]]
        torch.testing.assert_close(weight.sum(1), torch.ones(token_map.lengths[b]))


def test_the_rank_rule_follows_the_content_under_a_ceiling():
    attention = torch.zeros(6, 40)
    attention[:3, :3] = torch.eye(3) + 0.1
    raters = torch.arange(4)
    method = vtc.create("sparsevlm", rule="rank", scale=4.0, bias=1.0)
    assert {"adaptive", "merges"} <= method.tags
    assert "adaptive" not in vtc.create("sparsevlm").tags
    tokens = tokens_of(attention, raters, budget=40)
    assert method.ranked(tokens).item() == 13  # rank 3
    assert method.stages()[0].decide(tokens).lengths == (13 + method._clusters(27),)
    assert method.stages()[0].decide(dataclasses.replace(tokens, budget=(7,))).lengths == (7,)
    full = torch.eye(6)
    assert method.ranked(tokens_of(full, torch.arange(6), budget=6)).item() == 6


def test_a_pull_near_zero_is_guarded():
    safe, raw = (vtc.create("sparsevlm-plus", variant=v, heads=0) for v in ("paper", "reference"))
    _, tokens = drawn(safe, lengths=(20,), H=4)
    pull = torch.full((1, 6, 20), 0.5)
    pull[:, :, 3] = -1e-6
    tokens = dataclasses.replace(tokens, signals={**tokens.signals, "text_gravity": pull})
    assert bool((safe.score(tokens) >= 0).all())
    assert float(raw.score(tokens)[0, 3]) < -1
    same = torch.ones(20, dtype=torch.bool)
    same[3] = False
    torch.testing.assert_close(safe.score(tokens)[:, same], raw.score(tokens)[:, same])


def test_the_heads_that_look_at_the_image_count():
    _, tokens = drawn(vtc.create("sparsevlm-plus"), lengths=(20,), H=5)
    attention = tokens.signal("text_attention_heads")
    few, plain = vtc.create("sparsevlm-plus", heads=2, gravity=False), vtc.create("sparsevlm-plus", gravity=False)
    raters = few.raters(tokens)[0]
    mass = attention[0, :, raters].sum(dim=(1, 2))
    best = mass.topk(2).indices
    torch.testing.assert_close(few.score(tokens)[0], attention[0, best][:, raters].mean(dim=(0, 1)))
    torch.testing.assert_close(plain.score(tokens)[0], attention[0][:, raters].mean(dim=(0, 1)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_signals_of_single_heads_and_of_distance(implementation):
    """Heads have the mean that is known, and RoPE makes a mean of cosines of a distance."""
    llava = tiny("llava", implementation)
    inputs = llava.inputs(PROMPTS)
    seen = []

    def filter(tokens):
        seen.append(tokens)
        return torch.arange(tokens.x.shape[1]).expand(len(tokens.lengths), -1).masked_fill(~tokens.mask, -1)

    names = ("text_attention_heads", "text_attention", "text_gravity", "position", "text_position")
    stage = Stage(Site("layer", 2), filter, signals=tuple(map(Signal, names)), pool="sample")
    stage = dataclasses.replace(stage, budget=vtc.Budget(ratio=1.0))
    with vtc.compress(llava.model, GivenStages(given=(stage,))), torch.no_grad():
        llava.model(**inputs)
    (tokens,) = seen
    by_head = tokens.signal("text_attention_heads")
    torch.testing.assert_close(by_head.mean(1), tokens.signal("text_attention"))
    assert by_head.std(dim=1).max() > 1e-4
    rotary = llava.model.model.language_model.rotary_emb.inv_freq
    padding = (inputs["attention_mask"] == 0).sum(1)
    real = torch.tensor([b for b in range(len(padding)) if int((inputs["input_ids"][b] == llava.placeholder).sum())])
    assert len(real) == len(tokens.lengths) and bool((padding >= 0).all())
    gap = tokens.signal("text_position")[..., None] - tokens.signal("position")[:, None]
    expected = torch.cos(gap[..., None] * rotary).mean(-1)
    valid = tokens.signal("text_mask")[..., None] & tokens.mask[:, None]
    torch.testing.assert_close(tokens.signal("text_gravity")[valid], expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize(
    "spec", ["sparsevlm@1|2|3:8(convention=final)", "sparsevlm@1|2|3:8(convention=final, place=own)"]
)
def test_batches_equal_single_prompts(spec, positions):
    """Padding, a prompt with two images and one without: every sample is decided and continued as if it were alone."""
    llava = tiny("llava")
    model, batch = llava.model, llava.inputs(PROMPTS)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vtc.compress(model, spec, positions=positions) as handle, torch.no_grad():
        together = model.generate(**batch, **options)
        assert handle.report.after_last_cut == (8, 16, 0)
        images = batch["pixel_values"].split([prompt.count("image") for prompt in PROMPTS])
        for b, pixels in enumerate(images):
            ids = batch["input_ids"][b : b + 1, batch["attention_mask"][b].bool()]
            one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            alone = model.generate(**one, **({"pixel_values": pixels} if len(pixels) else {}), **options)
            for here, there in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(here[b : b + 1], there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("slug", "options", "says"),
    [
        ("sparsevlm", {"layers": (4, 2)}, "ascending"),
        ("sparsevlm", {"layers": (2, 4)}, "convention='final'"),
        ("sparsevlm", {"layers": (2, 4), "counts": (9,)}, "each of 2 cuts"),
        ("sparsevlm", {"counts": (9, 0, 1)}, "from 1 on"),
        ("sparsevlm", {"rule": "fixed"}, "rule='fixed'"),
        ("sparsevlm", {"place": "front"}, "place='front'"),
        ("sparsevlm", {"convention": "first"}, "convention='first'"),
        ("sparsevlm", {"recycle": 1.5}, "recycle=1.5"),
        ("sparsevlm", {"clusters": -0.1}, "clusters=-0.1"),
        ("sparsevlm", {"variant": "v1"}, "variant='v1'"),
        ("sparsevlm-plus", {"heads": -1}, "heads=-1"),
        ("sparsevlm-plus", {"floor": 0.0}, "floor=0.0"),
    ],
)
def test_options_that_cannot_be(slug, options, says):
    with pytest.raises(errors.SpecError, match=says):
        vtc.create(slug, budget=8, **options)
