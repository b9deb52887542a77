"""What becomes of tokens that do not stay: freezing, parking, eviction, dropping everything; and renumbering."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.stages import Drop, Freeze, Park, Repeat, Site, Stage, Weigh, nothing
from vtc.testing import GivenStages, masked_logits, relative_difference, visible_columns
from vtc.testing.tiny import PROMPTS
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Tokens

TOLERANCE = 1e-5
BATCHES = {"one": PROMPTS[:1], "three": PROMPTS}
LAYERS = 4
of_every_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


def scattered(tokens: Tokens) -> torch.Tensor:
    """As many tokens as the budget says, spread over each group."""
    width = max(tokens.budget)
    rows = [sorted((5 * i + 1) % n for i in range(k)) for n, k in zip(tokens.lengths, tokens.budget, strict=True)]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def freeze(*layers: int) -> tuple[Stage, ...]:
    whole = Budget(ratio=1.0)
    return tuple(Stage(Site("layer", k), nothing, leave=Freeze(), budget=whole) for k in layers)


def drop(layer: int, tokens: int, **options) -> tuple[Stage, ...]:
    return (Stage(Site("layer", layer), scattered, budget=Budget(tokens=tokens), **options),)


def pace(total: int, budget: int, step: int, steps: int) -> int:
    return budget


def drop_all(layer: int, samples: set[int]) -> tuple[Stage, ...]:
    def none_of(tokens: Tokens, keep: torch.Tensor, links: object) -> TokenMap:
        lengths = tuple(0 if b in samples else n for b, n in enumerate(tokens.lengths))
        return TokenMap.identity(tokens.lengths).then(
            TokenMap.select(TokenMap.identity(lengths).anchor, tokens.x.shape[1], lengths)
        )

    return (Stage(Site("layer", layer), scattered, None, none_of, pool="sample", budget=Budget(ratio=1.0)),)


def generate(model, inputs, stages, positions="original", count=4):
    with vtc.compress(model, GivenStages(given=stages), positions=positions) as handle, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        cached = model(**inputs, use_cache=True)
        plain = model(**inputs, use_cache=False)
        return out, cached, plain, handle.report


def extended(inputs, sequences):
    dense = sequences.shape[1] - inputs["input_ids"].shape[1] - 1
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, dense), value=1)
    return {**inputs, "input_ids": sequences[:, :-1], "attention_mask": mask}, dense


def compare(llava, inputs, stages, unchanged=None, visible=None):
    """Prefill with and without a cache and every decode step against the oracle."""
    out, cached, plain, report = generate(llava.model, inputs, stages)
    full, dense = extended(inputs, out.sequences)
    length = inputs["input_ids"].shape[1]
    seen = visible or visible_columns(names.cache_of(out), length, dense)
    is_visual = full["input_ids"] == llava.placeholder
    expected = masked_logits(
        llava.model, full, seen, unchanged=None if unchanged is None else lambda layer: unchanged(layer, is_visual)
    )
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    text = ~is_visual[:, :length] & inputs["attention_mask"].bool()
    for output in (cached, plain):
        assert relative_difference(output.logits[text], expected[:, :length][text]) < TOLERANCE
    return out, report


@of_every_batch
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layers", [(1,), (0, 2), (1, 2, 3)])
def test_frozen_layers_leave_the_visual_rows_unchanged(llava, layers, prompts, padding):
    inputs = llava.inputs(prompts, padding=padding)
    everything = torch.ones(1, 1, dtype=torch.bool)
    _, report = compare(
        llava,
        inputs if padding == "left" or len(prompts) == 1 else llava.inputs(prompts),
        freeze(*layers),
        unchanged=lambda layer, is_visual: is_visual & (layer in layers),
        visible=lambda layer: everything,
    )
    assert report.per_layer == (report.visual_tokens,) * LAYERS
    assert report.flops < report.flops_dense
    assert report.kv_bytes == report.kv_bytes_dense


@of_every_batch
def test_some_tokens_frozen_and_some_dropped(llava, prompts):
    """Dropping at layer 1, and freezing in layer 2 all but four of what is left."""
    inputs = llava.inputs(prompts)
    awake = Stage(Site("layer", 2), scattered, leave=Freeze(), budget=Budget(tokens=4))
    out, _, _, report = generate(llava.model, inputs, (*drop(1, 9), awake))
    full, dense = extended(inputs, out.sequences)
    length = inputs["input_ids"].shape[1]
    seen = visible_columns(names.cache_of(out), length, dense)
    # frozen: of the tokens that are left, all but those that `scattered` names, counted within each image
    unchanged = torch.zeros_like(full["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(full["input_ids"]):
        columns = (ids == llava.placeholder).nonzero()[:, 0]
        for image in columns.split(16):
            left = [int(c) for c in image if seen(2)[row, c]]
            unchanged[row, [c for i, c in enumerate(left) if i not in sorted((5 * j + 1) % 9 for j in range(4))]] = True
    expected = masked_logits(llava.model, full, seen, unchanged=lambda layer: unchanged & (layer == 2))
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    assert report.per_layer[1:] == (tuple(9 * p.count("image") for p in prompts),) * 3


@of_every_batch
@pytest.mark.parametrize(("at", "until"), [(1, 2), (1, 3), (0, 2)])
def test_parked_tokens_skip_layers_and_come_back(llava, at, until, prompts):
    inputs = llava.inputs(prompts)
    stages = drop(at, 5, leave=Park(until))
    with vtc.compress(llava.model, GivenStages(given=stages)), torch.no_grad():
        cache = names.cache_of(llava.model(**inputs, use_cache=True))
    held = visible_columns(cache, inputs["input_ids"].shape[1])

    def rested(layer, is_visual):
        width = inputs["input_ids"].shape[1]
        there = torch.nn.functional.pad(held(layer), (0, is_visual.shape[1] - width), value=True)
        return is_visual & ~there

    _, report = compare(llava, inputs, stages, unchanged=rested)
    images = tuple(prompt.count("image") for prompt in prompts)
    for layer, lengths in enumerate(report.per_layer):
        assert lengths == tuple((5 if at <= layer < until else 16) * n for n in images)


@of_every_batch
def test_evicted_entries_are_hidden_from_later_tokens_only(llava, prompts):
    inputs = llava.inputs(prompts)
    stages = drop(3, 4, leave=Drop(evict=1))
    out, _, _, report = generate(llava.model, inputs, stages)
    full, dense = extended(inputs, out.sequences)
    length = inputs["input_ids"].shape[1]
    after = visible_columns(names.cache_of(out), length, dense)
    total = length + dense

    def seen(layer):
        rows = after(layer)[:, None].expand(-1, total, -1).clone()
        if layer < 3:  # the prompt itself saw everything
            rows[:, :length, :length] = True
        return rows

    expected = masked_logits(llava.model, full, seen)
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    lengths = [layer.keys.shape[2] for layer in names.cache_of(out).layers]
    assert lengths[1] == lengths[2] == lengths[3] < lengths[0]
    is_visual = full["input_ids"] == llava.placeholder
    for layer in (1, 2, 3):
        assert torch.equal(after(layer) & is_visual, after(3) & is_visual)
    assert report.kv_tokens[1] == report.kv_tokens[3] != report.kv_tokens[0]


@of_every_batch
def test_eviction_of_all_layers_before(llava, prompts):
    inputs = llava.inputs(prompts)
    out, _, _, report = generate(llava.model, inputs, (*drop(1, 9), *drop(3, 4, leave=Drop(evict=0))))
    full, dense = extended(inputs, out.sequences)
    length = inputs["input_ids"].shape[1]
    after = visible_columns(names.cache_of(out), length, dense)
    with vtc.compress(llava.model, GivenStages(given=(*drop(1, 9), *drop(3, 4)))), torch.no_grad():
        before = visible_columns(names.cache_of(llava.model(**inputs, use_cache=True)), length, dense)

    def seen(layer):
        rows = after(layer)[:, None].expand(-1, length + dense, -1).clone()
        rows[:, :length] = before(layer)[:, None]
        return rows

    expected = masked_logits(llava.model, full, seen)
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    assert len(set(report.kv_tokens)) == 1


@pytest.mark.parametrize("samples", [{0}, {1, 2}, {0, 1, 2}])
def test_a_sample_may_lose_every_visual_token(llava, samples):
    inputs = llava.inputs(PROMPTS)
    _, report = compare(llava, inputs, (*drop_all(2, samples), *drop(3, 4)))
    for row, prompt in enumerate(PROMPTS):
        assert report.per_layer[2][row] == (0 if row in samples else 16 * prompt.count("image"))
        assert report.per_layer[3][row] == (0 if row in samples else 4 * prompt.count("image"))


@of_every_batch
@pytest.mark.parametrize("padding", ["left", "right"])
def test_renumbered_positions_close_every_gap(llava, prompts, padding):
    inputs = llava.inputs(prompts, padding=padding)
    stages = (*drop(1, 9), *drop(3, 4))
    out, cached, _, _ = generate(llava.model, inputs, stages, positions="renumber")
    length = inputs["input_ids"].shape[1]
    if padding == "right" and len(prompts) > 1:  # generation needs left padding, a prefill does not
        full, dense, logits = inputs, 0, cached.logits
    else:
        (full, dense), logits = extended(inputs, out.sequences), torch.stack(out.logits, dim=1)
    seen = visible_columns(names.cache_of(out), length, dense)
    valid = full["attention_mask"].bool()

    def positions(layer):
        return ((seen(layer) & valid).long().cumsum(1) - 1).clamp(min=0)

    expected = masked_logits(llava.model, full, seen, layer_positions=positions)
    if dense:
        assert relative_difference(logits, expected[:, length - 1 :]) < TOLERANCE
    else:
        kept = seen(3) & valid
        assert relative_difference(logits[kept], expected[kept]) < TOLERANCE


def test_second_turn_after_freezing_evicting_and_renumbering(llava):
    """What the memory holds is enough to go on: the second turn equals the whole conversation in one prefill."""
    inputs = llava.inputs(PROMPTS)
    question = torch.randint(5, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    for stages, positions in ((freeze(0, 2), "original"), (drop(2, 5), "renumber"), (freeze(1), "compact")):
        with vtc.compress(llava.model, GivenStages(given=stages), positions=positions), torch.no_grad():
            cache = names.cache_of(llava.model(**inputs, use_cache=True))
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
            two = llava.model(
                input_ids=question, attention_mask=mask, **names.cache_argument(llava.model, cache)
            ).logits
            ids = torch.cat([inputs["input_ids"], question], dim=1)
            one = llava.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -4:]
        assert relative_difference(two, one) < TOLERANCE


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: drop(2, 4, leave=Park(until=2)), "come back before a layer in 3..3"),
        (lambda: drop(2, 4, leave=Park(until=9)), "come back before a layer in 3..3"),
        (lambda: (*drop(1, 8, leave=Park(until=3)), *drop(2, 4)), "tokens parked until layer 3"),
        (lambda: drop(2, 4, leave=Drop(evict=2)), "no layer before 2"),
        (lambda: (*freeze(1), *freeze(1)), "both freeze layer 1"),
        (lambda: drop(2, 4, leave=Park(until=0)), "until=0 is neither"),
        (lambda: drop(2, 4, leave=Park(until=3.0)), "until=3.0 is neither"),
        (lambda: drop(2, 4, leave=Drop(evict=-1)), "evict=-1 is neither"),
        (lambda: (Stage(Site("llm_in"), scattered, leave=Drop(evict=0)),), "evicts from caches, which only layer.k."),
        (lambda: (Stage(Site("tower_out"), scattered, leave=Park(until=3)),), "parks tokens, which only layer.k."),
        (lambda: (Stage(Site("tower", 0), nothing, leave=Freeze()),), "freezes tokens, which only layer.k."),
        (lambda: drop(2, 4, leave=Weigh()), "weighs merged tokens by their sizes, which only tower.i."),
        (lambda: (Stage(Site("llm_in"), scattered, schedule=Repeat(pace)),), "repeats, which only"),
        (lambda: drop(2, 4, schedule=Repeat(pace, carry=lambda tokens: tokens.x)), "carries something on, which only"),
    ],
)
def test_refusals(llava, stages, message):
    with pytest.raises(errors.SpecError, match=message), vtc.compress(llava.model, GivenStages(given=stages())):
        pass


def test_a_word_in_place_of_a_record_is_refused():
    (stage,) = drop(2, 4)
    object.__setattr__(stage, "leave", "park")  # the constructor's types are checked in tests
    with pytest.raises(errors.SpecError, match="Use Drop"):
        stage.__post_init__()


def test_attention_of_a_frozen_layer_is_refused(llava):
    fastv = vtc.create("fastv", layer=2, budget=4)
    with pytest.raises(errors.UnsupportedFeatureError, match="lets no visual token"):
        vtc.patch(llava.model, [GivenStages(given=freeze(1)), fastv])


def test_shares_of_the_depth_become_layers(llava):
    stage = Stage(Site("layer", 0.5), scattered, budget=Budget(tokens=4), schedule=lambda n, k: n - k)
    with vtc.compress(llava.model, GivenStages(given=(stage,))) as handle, torch.no_grad():
        llava.model(**llava.inputs(PROMPTS[:1]))
    assert [lengths[0] for lengths in handle.report.per_layer] == [16, 16, 12, 12]
