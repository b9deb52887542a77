"""Merges at the door and in the LLM: before a layer or before its MLP, and with log(size) on the keys from there on.

Expected is the stock model on full-length hidden states, with the same means written into them.
"""

import contextlib

import pytest
import torch

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.primitives import mean_merge
from vtc.stages import Drop, Freeze, Links, Park, Signal, Site, Stage, nothing
from vtc.testing import GivenStages, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Budget

TOLERANCE = 1e-5
BATCHES = {"one": PROMPTS[:1], "three": PROMPTS}
of_every_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


def slots(count, wanted):
    """Which of `wanted` runs each of `count` tokens lies in; the first of a run takes in the others."""
    return [j * wanted // count for j in range(count)]


def first_of_run(tokens):
    rows = []
    for n, k in zip(tokens.lengths, tokens.budget, strict=True):
        slot = slots(n, k)
        rows.append([slot.index(i) for i in range(k)] + [-1] * (max(tokens.budget) - k))
    return torch.tensor(rows)


def to_first_of_run(tokens, keep):
    width = tokens.x.shape[1]
    slot = torch.full((len(tokens.lengths), width), -1)
    for b, (n, k) in enumerate(zip(tokens.lengths, tokens.budget, strict=True)):
        slot[b, :n] = torch.tensor(slots(n, k))
    source = torch.arange(width).expand_as(slot)
    slot = slot.masked_fill((source[..., None] == keep[:, None]).any(-1), -1)
    return Links(source, slot, (slot >= 0).float())


def merge(site, tokens):
    budget = Budget(tokens=tokens, per="sample")
    return Stage(site, first_of_run, to_first_of_run, mean_merge, pool="sample", budget=budget)


class Expected:
    """The same merges on full-length hidden states, written without the engine: what each layer sees and adds."""

    def __init__(self, is_visual, merges, layers):
        self.merges, self.is_visual = merges, is_visual
        alive = [row.nonzero()[:, 0].tolist() for row in is_visual]
        sizes = [[1.0] * len(row) for row in alive]
        self.runs, self.bias, self.kept = {}, [], []
        for layer in range(layers):
            if layer in merges:
                self.runs[layer] = []
                for b, columns in enumerate(alive):
                    slot = slots(len(columns), min(merges[layer], len(columns))) if columns else []
                    members = [[j for j, s in enumerate(slot) if s == i] for i in sorted(set(slot))]
                    runs = [[columns[j] for j in run] for run in members]
                    sizes[b] = [sum(sizes[b][j] for j in run) for run in members]
                    alive[b] = [run[0] for run in runs]
                    self.runs[layer].append(runs)
            bias, kept = torch.zeros(is_visual.shape), ~is_visual
            for b, columns in enumerate(alive):
                bias[b, columns] = torch.tensor(sizes[b]).log()
                kept[b, columns] = True
            self.bias.append(bias)
            self.kept.append(kept)

    def entering(self, layer, hidden):
        if layer not in self.runs:
            return hidden
        hidden = hidden.clone()
        for b, runs in enumerate(self.runs[layer]):
            for run in runs:
                hidden[b, run[0]] = hidden[b, run].mean(dim=0)
        return hidden

    def logits(self, model, inputs, size_bias=True, before_mlp=False):
        bias = self.bias.__getitem__ if size_bias else None
        if not before_mlp:
            return masked_logits(model, inputs, self.kept.__getitem__, key_bias=bias, entering=self.entering)
        with contextlib.ExitStack() as stack:
            for layer in self.merges:
                for hook in self.between(adapter_for(model).layers[layer - 1], layer):
                    stack.callback(hook.remove)
            return masked_logits(model, inputs, self.kept.__getitem__, key_bias=bias)

    def between(self, module, layer):
        """Hooks after which the two halves of decoder layer `module` differ by the merges of `layer`."""
        found = {}
        # the residual stream is what entered the layer and the output of this module
        added = module.post_attention_layernorm if hasattr(module, "post_feedforward_layernorm") else module.self_attn

        def enter(module, args):
            found["x"] = args[0]

        def leave(module, args, output):
            part = output[0] if isinstance(output, tuple) else output
            middle = found["x"] + part
            part = part + self.entering(layer, middle) - middle
            return (part, *output[1:]) if isinstance(output, tuple) else part

        return module.register_forward_pre_hook(enter), added.register_forward_hook(leave)


CASES = {
    "layer 2": {2: 5},
    "layers 1 and 3": {1: 9, 3: 4},
    "door": {0: 5},
    "door and layer 2": {0: 9, 2: 4},
}


def stages_of(merges, before_mlp=False):
    sites = {layer: Site("layer", layer, before_mlp) if layer else Site("llm_in", None, before_mlp) for layer in merges}
    return tuple(merge(sites[layer], tokens) for layer, tokens in merges.items())


def check(one, prompts, merges, size_bias=True, before_mlp=False):
    """A prefill with and without cache, and every decode step; `size_bias` or `before_mlp` make a difference."""
    inputs, model = one.inputs(prompts), one.model
    method = GivenStages(given=stages_of(merges, before_mlp=before_mlp))
    with vtc.compress(model, method, positions="original", size_bias=size_bias), torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=one.special,
        )
        plain = model(**inputs, use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    full = one.extend(inputs, out.sequences[:, length:-1])
    merged = Expected(full["input_ids"] == one.placeholder, merges, 4)
    expected = merged.logits(model, full, size_bias, before_mlp)
    assert relative_difference(torch.stack(out.logits, dim=1), expected[:, length - 1 :]) < TOLERANCE
    text = (inputs["input_ids"] != one.placeholder) & inputs["attention_mask"].bool()
    assert relative_difference(plain[text], expected[:, :length][text]) < TOLERANCE
    other = merged.logits(model, full, size_bias=before_mlp and size_bias, before_mlp=False)
    assert relative_difference(expected[:, length - 1], other[:, length - 1]) > 10 * TOLERANCE


@of_every_batch
@pytest.mark.parametrize("merges", CASES.values(), ids=CASES)
def test_llava(llava, prompts, merges):
    check(llava, prompts, merges)


@of_every_batch
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "internvl"])
def test_other_families(family, prompts):
    check(tiny(family), prompts, CASES["door and layer 2"])


@of_every_batch
@pytest.mark.parametrize("merges", [{2: 5}, {1: 9, 3: 4}], ids=str)
def test_merges_before_the_mlp(llava, prompts, merges):
    check(llava, prompts, merges, size_bias=False, before_mlp=True)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "internvl"])
def test_merges_before_the_mlp_of_other_families(family):
    check(tiny(family), PROMPTS, {1: 9, 2: 4}, size_bias=True, before_mlp=True)


def test_a_merge_before_the_mlp_leaves_the_cache_of_its_layer_whole(llava):
    inputs = llava.inputs(PROMPTS)
    with vtc.compress(llava.model, GivenStages(given=stages_of({2: 5}, before_mlp=True))) as handle, torch.no_grad():
        cache = names.cache_of(llava.model(**inputs, use_cache=True))
        report = handle.report
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3]
    assert report.per_layer == ((16, 32, 0),) * 2 + ((5, 5, 0),) * 2
    modules = [module for layer in llava.model.model.language_model.layers for module in (layer, *layer.children())]
    assert not any("forward" in vars(module) for module in modules)


def test_a_merge_before_the_mlp_that_keeps_everything_changes_no_bit(llava):
    inputs = llava.inputs(PROMPTS)
    stage = Stage(Site("layer", 2, before_mlp=True), first_of_run, budget=Budget(ratio=1.0))
    with torch.no_grad():
        before = llava.model(**inputs).logits
        with vtc.compress(llava.model, GivenStages(given=(stage,)), positions="original"):
            assert torch.equal(llava.model(**inputs).logits, before)


def frozen_at(layer):
    return Stage(Site("layer", layer), nothing, leave=Freeze(), budget=Budget(ratio=1.0))


def parked(layer, until):
    return Stage(Site("layer", layer), first_of_run, leave=Park(until), budget=Budget(tokens=4))


def early(layer, *signals):
    signals = tuple(Signal(name) if isinstance(name, str) else name for name in signals)
    return Stage(Site("layer", layer, before_mlp=True), first_of_run, signals=signals, budget=Budget(tokens=4))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: (early(0),), "layers 1..3"),
        (lambda: (frozen_at(1), early(2)), "acts inside layer 1"),
        (lambda: (parked(1, 3), early(3)), "tokens parked until layer 3"),
        (lambda: (early(2, "layer_keys"),), "before_mlp=False"),
        (lambda: (early(2, Signal("keys", layer=1)),), "layer=0 or less"),
        (lambda: (Stage(Site("llm_in", before_mlp=True), first_of_run),), "layer.k. stages"),
        (lambda: (Stage(Site("layer", 2, before_mlp=True), nothing, leave=Freeze()),), "layer.k. stages"),
    ],
)
def test_refusals_before_the_mlp(sdpa_llava, stages, message):
    with pytest.raises(errors.VTCError, match=message):
        vtc.patch(sdpa_llava.model, GivenStages(given=stages()))


def test_no_merge_between_a_layer_and_its_deepstack_features():
    """DeepStack adds to all visual tokens behind its last layer, so the half before belongs to it."""
    one = tiny("qwen3_vl")
    first, _ = adapter_for(one.model).lowest_layer
    assert first > 0
    with pytest.raises(errors.SpecError, match=f"@{first + 1}"):
        vtc.patch(one.model, GivenStages(given=(early(first),)))
    with vtc.compress(one.model, GivenStages(given=(early(first + 1),))), torch.no_grad():
        one.model(**one.inputs())


def test_second_turn_keeps_the_sizes_of_each_layer(llava):
    inputs = llava.inputs(PROMPTS)
    question = torch.randint(5, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    method = GivenStages(given=stages_of(CASES["door and layer 2"]))
    for positions in ("original", "compact", "renumber"):
        with vtc.compress(llava.model, method, positions=positions, size_bias=True), torch.no_grad():
            cache = names.cache_of(llava.model(**inputs, use_cache=True))
            two = llava.model(
                input_ids=question, attention_mask=mask, **names.cache_argument(llava.model, cache)
            ).logits
            ids = torch.cat([inputs["input_ids"], question], dim=1)
            one = llava.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -4:]
        assert relative_difference(two, one) < TOLERANCE


def test_second_turn_with_new_images(llava):
    """Sizes of both turns, and zeros for the text generated between them."""
    first, second = llava.inputs(PROMPTS[1:2]), llava.inputs(((4, "image", 3),), seed=1)
    merges = {1: 0.25}
    stage = Stage(
        Site("layer", 1), first_of_run, to_first_of_run, mean_merge, budget=Budget(ratio=merges[1])
    )  # image by image, so that each turn merges what the whole conversation would
    words = torch.randint(5, 100, (1, 2), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first["input_ids"], words, second["input_ids"]], dim=1)
    with vtc.compress(llava.model, GivenStages(given=(stage,)), positions="original", size_bias=True), torch.no_grad():
        cache = names.cache_of(llava.model(**first, use_cache=True))
        llava.model(input_ids=words, **names.cache_argument(llava.model, cache))
        two = llava.model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            **names.cache_argument(llava.model, cache),
        ).logits
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        one = llava.model(input_ids=ids, pixel_values=pixels, use_cache=True)
    length = second["input_ids"].shape[1]
    assert relative_difference(two[:, -3:], one.logits[:, -3:]) < TOLERANCE
    for left, right in zip(cache._vtc.layers, names.cache_of(one)._vtc.layers, strict=True):
        assert torch.equal(left.column, right.column)
        assert (left.bias is None) == (right.bias is None)
        if left.bias is not None:
            assert torch.equal(left.bias, right.bias)
            assert left.bias[:, : -length + 12].max() > 1


@of_every_batch
def test_frozen_and_evicted_layers_keep_the_sizes(llava, prompts):
    """The bias follows the entries where a cache holds them in another order, or loses some of them."""
    inputs = llava.inputs(prompts)
    frozen = Stage(Site("layer", 3), nothing, leave=Freeze(), budget=Budget(ratio=1.0))
    evicting = Stage(
        Site("layer", 3), first_of_run, pool="sample", budget=Budget(tokens=3, per="sample"), leave=Drop(evict=1)
    )
    for last in (frozen, evicting):
        method = GivenStages(given=(*stages_of({2: 5}), last))
        with vtc.compress(llava.model, method, positions="original", size_bias=True), torch.no_grad():
            cache = names.cache_of(llava.model(**inputs, use_cache=True))
        table = Expected(inputs["input_ids"] == llava.placeholder, {2: 5}, 4).bias
        for layer, held in enumerate(cache._vtc.layers):
            wanted = table[layer].gather(1, held.column.clamp(min=0)).masked_fill(held.column < 0, 0)
            found = torch.zeros_like(wanted) if held.bias is None else held.bias.masked_fill(held.column < 0, 0)
            torch.testing.assert_close(found, wanted)


def test_signals_read_the_attention_that_the_layer_gives():
    """Probabilities of the stock eager layer, log(size) of what the door merged included."""
    one = tiny("llava", "eager")
    found, given = {}, {}

    def noting(tokens):
        found["last"] = tokens.signal("query_attention")
        return first_of_run(tokens)

    stage = Stage(
        Site("layer", 2), noting, signals=(Signal("query_attention"),), pool="sample", budget=Budget(tokens=4)
    )
    attention = one.model.model.language_model.layers[1].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: given.update(weights=output[1]))
    method = GivenStages(given=(*stages_of({0: 5}), stage))
    inputs = one.inputs()
    with vtc.compress(one.model, method, positions="original", size_bias=True), torch.no_grad():
        one.model(**inputs)
    hook.remove()
    first = int((inputs["input_ids"][0] == one.placeholder).nonzero()[0])
    torch.testing.assert_close(found["last"], given["weights"][:, :, -1].mean(1)[:, first : first + 5])


def test_a_merge_that_keeps_everything_changes_no_bit(llava):
    inputs = llava.inputs(PROMPTS)
    with torch.no_grad():
        before = llava.model(**inputs).logits
        with vtc.compress(llava.model, "pool:16 + fastv@2:16", positions="original", size_bias=True):
            assert torch.equal(llava.model(**inputs).logits, before)


def test_methods_say_it_and_users_override(llava):
    assert vtc.create("pact").size_bias
    inputs, logits = llava.inputs(PROMPTS), {}
    for choice in (None, True, False):
        options = {} if choice is None else {"size_bias": choice}
        with vtc.compress(llava.model, "pact@2:5(cutoff=0.9)", **options), torch.no_grad():
            out = llava.model(**inputs, use_cache=True)
        logits[choice] = out.logits
        assert (names.cache_of(out)._vtc.layers[2].bias is not None) == (choice is not False)
        assert visible_columns(names.cache_of(out), inputs["input_ids"].shape[1])(3).sum() < inputs["input_ids"].numel()
    assert torch.equal(logits[None], logits[True])
    assert relative_difference(logits[None], logits[False]) > 1e-5


def test_flash_attention_is_refused(sdpa_llava):
    config = sdpa_llava.model.config.text_config
    config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(errors.UnsupportedFeatureError, match="size_bias=False"):
            vtc.patch(sdpa_llava.model, "pact@2:5")
        vtc.patch(sdpa_llava.model, "pact@2:5", size_bias=False).remove()
    finally:
        config._attn_implementation = "sdpa"
