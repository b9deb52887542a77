"""`tower[i]`: the tower equals a slow one that applies the same decisions between attention and MLP, tile by tile."""

import dataclasses
import functools

import pytest
import torch

import vtc
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.engine.vision import passage as tower
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS, VIDEO_PROMPTS
from vtc.tokenmap import TokenMap

TOLERANCE = 1e-5
FAMILIES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "paligemma",
    "smolvlm",
    "video_llava",
)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclasses.dataclass(frozen=True)
class Scripted(vtc.Method):
    """Keeps arbitrary tokens in an arbitrary order, splits each other one between two of them, at chosen blocks."""

    slug = "scripted"
    steps = ("arbitrary", "two arbitrary ones", "weighted mean")
    fidelity = "control"
    tags = frozenset({"merges"})

    blocks: tuple[int, ...] = (0, 1)
    proportional: bool = True
    signals: tuple[str, ...] = ("keys", "queries", "sizes", "received_attention")
    seen: dict = dataclasses.field(default_factory=dict, compare=False)

    def stages(self):
        signals = tuple(vtc.Signal(name) for name in self.signals)
        count = len(self.blocks)
        return tuple(
            vtc.Stage(
                vtc.Site("tower", block),
                self.filter,
                None,
                self.compress,
                signals,
                schedule=lambda n, k, i=i: n - (n - k) * (i + 1) // count,
                leave=vtc.Weigh() if self.proportional else vtc.Drop(),
            )
            for i, block in enumerate(self.blocks)
        )

    def filter(self, tokens):
        self.seen[max(tokens.lengths)] = tokens
        return torch.zeros(len(tokens.lengths), 0, dtype=torch.long)

    def compress(self, tokens, keep, links):
        prefix, width = tokens.num_prefix, max(tokens.budget) + tokens.num_prefix
        anchors = torch.full((len(tokens.lengths), width), -1)
        edges = []
        for b, (n, k) in enumerate(zip(tokens.lengths, tokens.budget, strict=True)):
            generator = torch.Generator().manual_seed(n + 7 * b)
            order = (torch.randperm(n, generator=generator) + prefix).tolist()
            kept = [*range(prefix), *order[:k]]
            anchors[b, : len(kept)] = torch.tensor(kept)
            rows = [(token, slot, 0.6, 1.0) for slot, token in enumerate(kept)]
            for i, token in enumerate(order[k:]):
                rows += [(token, prefix + i % k, 0.3, 0.5), (token, prefix + (i + 1) % k, 0.2, 0.5)]
            edges.append(torch.tensor(rows))
        whole = torch.nn.utils.rnn.pad_sequence(edges, batch_first=True, padding_value=-1.0)
        source, slot = whole[..., 0].long().clamp(min=0), whole[..., 1].long()
        weight, mass = (whole[..., i].masked_fill(slot < 0, 0) for i in (2, 3))
        return TokenMap(
            anchors, tuple(k + prefix for k in tokens.budget), tokens.x.shape[1], source, slot, weight, mass
        )


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)  # [L, D] -> [H, L, d]


def attend(block, x, log_size):
    """Self-attention of one sequence [L, D], from the weights."""
    attention = getattr(block, "self_attn", None) or block.attention
    q, k, v = (getattr(attention, f"{part}_proj")(x) for part in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (heads(part, attention.num_heads) for part in (q, k, v))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + log_size
    mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return (getattr(attention, "out_proj", None) or attention.projection_layer)(mixed)


def halves(block, x, log_size):
    """What enters the MLP half, and a function that finishes the block."""
    if hasattr(block, "lambda_1"):
        middle = x + block.lambda_1 * attend(block, block.layernorm_before(x), log_size)
        return middle, lambda y: y + block.lambda_2 * block.mlp(block.layernorm_after(y))
    middle = x + attend(block, block.layer_norm1(x), log_size)
    return middle, lambda y: y + block.mlp(block.layer_norm2(y))


def slow_tower(encoder, embedded, decisions, visible, proportional):
    """For each tile what every block gives: [rows, D], and the host token of each row."""
    prefix, results = encoder.num_prefix, []
    group = 0
    for tile, x in enumerate(embedded):
        seen = visible[tile].nonzero()[:, 0].tolist() if visible is not None else list(range(x.shape[0] - prefix))
        rows = [*range(prefix), *(place + prefix for place in seen)]
        rest = sorted(set(range(x.shape[0])) - set(rows)) if seen else list(range(prefix, x.shape[0]))
        rows, shown = [*rows, *rest], len(rows)
        x, size = x[rows], torch.ones(len(rows))
        out = []
        for index, block in enumerate(encoder.blocks):
            middle, finish = halves(block, x, size.log() if proportional else torch.zeros(len(x)))
            if index in decisions and seen:
                one = decisions[index].groups([group])
                matrix, mass = (one.matrix(mass=m)[0, : one.lengths[0], :shown] for m in (False, True))
                middle = torch.cat([matrix @ middle[:shown], middle[shown:]])
                size = torch.cat([mass @ size[:shown], size[shown:]])
                anchor = one.anchor[0, : one.lengths[0]].tolist()
                rows, shown = [*(rows[a] for a in anchor), *rows[shown:]], one.lengths[0]
            x = finish(middle)
            out.append((x, rows))
        group += bool(seen)
        results.append(out)
    return results


class Recorded:
    """One forward under a patch, with everything that the slow tower needs."""

    def __init__(self, one, method, inputs, monkeypatch, modality="image"):
        adapter = adapter_for(one.model)
        self.encoder = next(e for e in adapter.encoders if e.modality == modality)
        self.decisions, self.states, self.passage = {}, None, None
        run_step = tower.run_step

        def spy(step, tokens):
            self.decisions[step.stage.site.index] = run_step(step, tokens)
            return self.decisions[step.stage.site.index]

        def embedded(module, args, kwargs):
            self.embedded = args[0] if args else kwargs["hidden_states"]

        def left(module, args, output):
            self.states, self.passage = output, vtc.engine.vision.call.ENCODE.get().passage

        monkeypatch.setattr(tower, "run_step", spy)
        hooks = [self.encoder.blocks[0].register_forward_pre_hook(embedded, with_kwargs=True)]
        with vtc.compress(one.model, method, positions="original") as handle, torch.no_grad():
            hooks.append(self.encoder.tower.register_forward_hook(left))
            self.output = one.model(**inputs, use_cache=True)
            self.report = handle.report
        for hook in hooks:
            hook.remove()
        monkeypatch.undo()


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family, attention="sdpa": made.setdefault((family, attention), tiny(family, attention))


@pytest.mark.parametrize("proportional", [True, False], ids=["log_size", "plain"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tower_equals_the_slow_one(models, monkeypatch, family, attention, proportional):
    one = models(family, attention)
    method = Scripted(budget=vtc.Budget(ratio=0.4), proportional=proportional)
    run = Recorded(one, method, one.inputs(PROMPTS), monkeypatch)
    check_states(run, proportional)
    assert sum(run.report.entering) < sum(run.report.visual_tokens)
    assert {"tower[0]", "tower[1]"} <= set(run.report.selection_ms)


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision", "video_llava"])
def test_videos(models, monkeypatch, family):
    one = models(family)
    method = Scripted(budget=vtc.Budget(ratio=0.4))
    run = Recorded(one, method, one.inputs(VIDEO_PROMPTS), monkeypatch, "video")
    check_states(run, True)
    assert sum(run.report.entering) < sum(run.report.visual_tokens)


def check_states(run, proportional):
    """Every hidden state of the tower, at the place of every row that was left, and stock shapes everywhere."""
    with torch.no_grad():
        slow = slow_tower(run.encoder, run.embedded, run.decisions, run.passage.visible, proportional)
    assert set(run.decisions) == {0, 1}
    states = run.states.hidden_states or (None,) * len(run.encoder.blocks) + (run.states.last_hidden_state,)
    compared = 0
    for tile, results in enumerate(slow):
        for index, (x, rows) in enumerate(results):
            state = states[index + 1]
            if state is None:
                continue
            assert state.shape == run.embedded.shape
            expected = x if run.states.hidden_states else last_norm(run.encoder, x)
            assert relative_difference(state[tile][rows], expected) < TOLERANCE
            compared += 1
    assert compared


def last_norm(encoder, x):
    with torch.no_grad():
        return getattr(encoder.tower, "post_layernorm", torch.nn.Identity())(x)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llm_sees_what_the_tower_left(models, family, attention):
    """Behind the tower everything is as published for a selection: the full model with the dropped keys masked."""
    one = models(family, attention)
    inputs = one.inputs(PROMPTS)
    entering = []
    hook = adapter_for(one.model).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with vtc.compress(one.model, "tome:0.4", positions="original") as handle, torch.no_grad():
        output = one.model(**inputs, use_cache=True)
        report = handle.report
    hook.remove()
    visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
    is_visual = inputs["input_ids"] == one.placeholder
    assert report.entering == tuple((visible(0) & is_visual).sum(1).tolist())
    expected = masked_logits(one.model, inputs, visible, replace=(is_visual, entering[0][is_visual]))
    kept = visible(0) & inputs["attention_mask"].bool()
    assert relative_difference(output.logits[kept], expected[kept]) < TOLERANCE


def test_every_patch_reads_where_it_went(models, monkeypatch):
    """Behind the tower a merged patch has the features of its token, and the report knows which that is."""
    one = models("llava")
    run = Recorded(one, vtc.create("tome", budget=5), one.inputs(), monkeypatch)
    state, token_map = run.states.hidden_states[-2][:, 1:], run.report.token_map
    assert token_map.lengths == (5,)
    assert token_map.anchor[0].tolist() == sorted(token_map.anchor[0].tolist())
    anchor = token_map.anchor.gather(1, token_map.sources())
    assert torch.equal(state, state.gather(1, anchor[..., None].expand_as(state)))
    torch.testing.assert_close(token_map.sizes().sum(), torch.tensor(16.0))


def test_a_batch_gives_what_each_image_gives_alone(models, monkeypatch):
    one = models("llava")
    pixels = torch.randn(3, 3, one.image_size, one.image_size, generator=torch.Generator().manual_seed(5))
    method = vtc.create("mustdrop", threshold=0.0, budget=0.9)
    features = []
    with vtc.compress(one.model, method) as _, torch.no_grad():
        together = one.model.model.get_image_features(pixels)
        for i in range(3):
            features.append(one.model.model.get_image_features(pixels[i : i + 1]).pooler_output[0])
    for i, alone in enumerate(features):
        assert relative_difference(together.pooler_output[i], alone) < TOLERANCE


def test_groups_of_different_length(models, monkeypatch):
    """Padding of shorter groups is masked in later blocks."""
    one = models("llava_next")
    run = Recorded(one, Scripted(budget=vtc.Budget(tokens=20)), one.inputs(PROMPTS), monkeypatch)
    assert len(set(run.passage.lengths)) > 1
    check_states(run, True)


def test_identity_and_removal(models):
    for family in FAMILIES:
        one = models(family)
        inputs = one.inputs(PROMPTS)
        with torch.no_grad():
            before = one.model(**inputs).logits
            attributes = {name: set(vars(module)) for name, module in one.model.named_modules()}
            hooks = {name: len(module._forward_hooks) for name, module in one.model.named_modules()}
            with vtc.compress(one.model, "tome:1.0") as handle:
                assert torch.equal(one.model(**inputs).logits, before)
                assert handle.report.entering == handle.report.visual_tokens
            with vtc.compress(one.model, "tome:0.5"):
                assert not torch.equal(one.model(**inputs).logits, before)
            assert torch.equal(one.model(**inputs).logits, before)
        assert {name: set(vars(module)) for name, module in one.model.named_modules()} == attributes
        assert {name: len(module._forward_hooks) for name, module in one.model.named_modules()} == hooks


def test_a_stage_that_keeps_all_changes_no_bit(models):
    """The two halves of a block, run one after the other, are the block."""

    @dataclasses.dataclass(frozen=True)
    class All(Scripted):
        tags = frozenset({"merges", "adaptive"})

        def compress(self, tokens, keep, links):
            return TokenMap.identity(tokens.ends)

    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            one = models(family, attention)
            inputs = one.inputs(PROMPTS)
            with torch.no_grad():
                before = one.model(**inputs).logits
                with vtc.compress(one.model, All(budget=vtc.Budget(ratio=1.0), proportional=False)) as handle:
                    # hidden tiles change places, which changes the order of sums
                    after = one.model(**inputs).logits
                    assert handle.report.entering == handle.report.visual_tokens
            if family in ("llava_next", "llava_next_video"):
                assert relative_difference(after, before) < TOLERANCE
            else:
                assert torch.equal(after, before), family


def test_a_tower_that_raises_leaves_nothing_behind(models):
    one = models("llava")
    inputs = one.inputs()
    with torch.no_grad():
        before = one.model(**inputs).logits
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
    handle = vtc.patch(one.model, "tome:8")
    with pytest.raises(vtc.VTCError, match="NaN"), torch.no_grad():
        one.model(**broken)
    with torch.no_grad():
        once = one.model(**inputs).logits
        assert torch.equal(one.model(**inputs).logits, once)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(one.model(**inputs).logits, before)


def test_signals_of_a_block(models, monkeypatch):
    """Keys, queries and attention of the block at which the stage acts, log(size) included."""
    one = models("llava", "eager")
    names = ("keys", "queries", "sizes", "received_attention", "cls_attention")
    method = Scripted(budget=vtc.Budget(tokens=6), signals=names)
    block = adapter_for(one.model).encoders[0].blocks[1]
    seen = []
    hook = block.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    Recorded(one, method, one.inputs(PROMPTS), monkeypatch)
    hook.remove()
    probabilities = next(part for part in seen if part is not None).mean(dim=1)
    (first, second) = (method.seen[n] for n in sorted(method.seen, reverse=True))
    torch.testing.assert_close(second.signal("cls_attention"), probabilities[:, 0, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.signal("received_attention"), probabilities.mean(1)[:, 1:], atol=1e-5, rtol=1e-4)
    assert torch.equal(first.signal("sizes"), torch.ones(3, 17))
    torch.testing.assert_close(second.signal("sizes").sum(dim=1), torch.full((3,), 17.0))
    assert second.signal("keys").shape[2] == second.signal("queries").shape[2] == second.x.shape[1]
    logits = second.signal("queries") @ second.signal("keys").transpose(2, 3) * second.signal("keys").shape[3] ** -0.5
    weights = (logits + second.signal("sizes").log()[:, None, None]).softmax(-1).mean(1)
    torch.testing.assert_close(weights, probabilities, atol=1e-5, rtol=1e-4)


def test_stages_compose_from_the_tower_to_the_decoder(models):
    one = models("llava")
    inputs = one.inputs(PROMPTS)
    with vtc.compress(one.model, "tome:12 + divprune:9 + fastv@2:5", positions="original") as handle, torch.no_grad():
        output = one.model(**inputs, use_cache=True)
        report = handle.report
    assert report.entering == (9, 18, 0)
    assert report.after_last_cut == (5, 10, 0)
    assert report.token_map.lengths == (5, 10)
    assert bool(torch.isfinite(output.logits[inputs["attention_mask"].bool()]).all())
    assert set(report.selection_ms) >= {"tower[0]", "tower[1]", "llm_in", "layer[2]"}


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "video_llava"])
def test_signals_behind_a_shortened_tower(models, family):
    """At tower_out a merged patch has the query and key of its token, so [CLS] gives all of them the same."""
    one = models(family)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Reads(vtc.Method):
        slug = "reads"
        steps = ("first tokens", "none", "drop")
        fidelity = "control"

        def stages(self):
            return (vtc.Stage(vtc.Site("tower_out"), self.filter, signals=(vtc.Signal("cls_attention"),)),)

        def filter(self, tokens):
            seen.append((tokens, tokens.signal("cls_attention")))
            keep = torch.arange(max(tokens.budget)).expand(len(tokens.lengths), -1)
            return keep.masked_fill(keep >= torch.tensor(tokens.budget)[:, None], -1)

    methods = [vtc.create("tome", budget=0.6), Reads(budget=vtc.Budget(ratio=0.3))]
    with vtc.compress(one.model, methods, positions="original") as handle, torch.no_grad():
        one.model(**one.inputs(PROMPTS))
        assert sum(handle.report.entering) < 0.5 * sum(handle.report.visual_tokens)
    ((tokens, attention),) = seen
    assert attention.shape == tokens.x.shape[:2]
    assert bool((attention.sum(dim=1) <= 1 + 1e-5).all()) and bool((attention[tokens.mask] > 0).all())


@pytest.mark.parametrize("family", QWEN)
def test_packed_towers_are_refused(family):
    with pytest.raises(vtc.VTCError, match="one packed sequence"):
        vtc.patch(tiny(family).model, "tome:8")


def test_padded_patches_are_refused():
    one = tiny("idefics3")
    inputs = one.inputs()
    mask = torch.ones(1, 1, one.image_size, one.image_size, dtype=torch.long)
    mask[..., one.image_size // 2 :] = 0
    with vtc.compress(one.model, "tome:8"), torch.no_grad():
        one.model(**inputs, pixel_attention_mask=torch.ones_like(mask))
        with pytest.raises(vtc.VTCError, match="padded inside the vision tower"):
            one.model(**inputs, pixel_attention_mask=mask)


def test_a_budget_below_the_prefix_of_the_llm_is_refused():
    one = tiny("video_llava")
    inputs = one.inputs(VIDEO_PROMPTS)
    handle = vtc.patch(one.model, vtc.create("tome", budget=vtc.Budget(tokens=1, per="frame")))
    with torch.no_grad(), pytest.raises(vtc.VTCError, match="prefix token"):
        one.model(**inputs)
    handle.remove()


def test_gradient_checkpointing_is_refused():
    one = tiny("llava")
    one.model.train()
    for block in adapter_for(one.model).encoders[0].blocks:
        block.gradient_checkpointing = True
        # older hosts look for it
        block._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    with vtc.compress(one.model, "tome:8"), pytest.raises(vtc.VTCError, match="checkpointing"):
        one.model.model.get_image_features(one.inputs()["pixel_values"])


def test_a_map_without_the_prefix_is_refused(models):
    @dataclasses.dataclass(frozen=True)
    class Forgets(Scripted):
        def compress(self, tokens, keep, links):
            return TokenMap.select(torch.zeros(len(tokens.lengths), 1, dtype=torch.long), tokens.x.shape[1])

    one = models("llava")
    method = Forgets(budget=vtc.Budget(tokens=4))
    with vtc.compress(one.model, method), torch.no_grad(), pytest.raises(vtc.VTCError, match="lists the 1 prefix"):
        one.model(**one.inputs())


def test_generate_equals_prefill_and_decode(models):
    one = models("llava")
    inputs = one.inputs(PROMPTS)
    with vtc.compress(one.model, "tome:6"), torch.no_grad():
        twice = [one.model.generate(**inputs, max_new_tokens=5, do_sample=False) for _ in range(2)]
        beams = one.model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(*twice) and beams.shape == twice[0].shape
