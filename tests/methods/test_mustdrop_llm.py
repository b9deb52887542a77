"""MustDrop's parts in the LLM: its filter against the authors' code, its layers, key set and eviction."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import GivenStages, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS

FILTER = golden_cases("mustdrop", Path(__file__).parents[1] / "golden", kind="filter_")


def tokens_of(attention, cls_attention, entered=None):
    texts, n = attention.shape
    everything = torch.ones(1, texts, dtype=torch.bool)
    return vtc.Tokens.of(
        torch.zeros(1, n, 4),
        n,
        text_attention=attention[None],
        text_mask=everything,
        text_after=everything,
        cls_attention=cls_attention[None],
        visual_mask=torch.ones(1, entered or n, dtype=torch.bool),
    )


@pytest.mark.parametrize("case", FILTER, ids=str)
def test_golden_filter(case):
    method = vtc.create(
        "mustdrop-llm",
        global_threshold=case.number("global_thr"),
        individual_threshold=case.number("individual_thr"),
    )
    tokens = tokens_of(case["attn_text_to_img"].mean(0), case["cls_attn"])
    key = method.key_tokens(tokens)[0]
    assert key.nonzero()[:, 0].tolist() == sorted(case["key_set"].tolist())
    kept = case["kept"]
    for stage in method.stages():
        assert torch.equal(stage.decide(tokens).anchor[0], kept)
    assert torch.equal(key[kept].nonzero()[:, 0], case["new_key_set"])
    # behind the first cut the key set is the same tokens: those of the best of what entered
    later = tokens_of(case["attn_text_to_img"].mean(0)[:, kept], case["cls_attn"][kept], len(case["cls_attn"]))
    assert torch.equal(method.key_tokens(later)[0].nonzero()[:, 0], case["new_key_set"])


def test_a_budget_is_a_ceiling_that_key_tokens_leave_last():
    generator = torch.Generator().manual_seed(0)
    attention, cls = torch.rand(5, 50, generator=generator), torch.rand(50, generator=generator)
    tokens = tokens_of(attention, cls)
    for budget in (1, 4, 10):
        keep = vtc.create("mustdrop-llm").stages()[0].decide(vtc.Tokens(**{**vars(tokens), "budget": (budget,)}))
        key = cls.topk(math.ceil(0.08 * 50)).indices.tolist()
        others = [i for i in attention.sum(dim=0).argsort(descending=True).tolist() if i not in key]
        assert keep.lengths == (budget,)
        if budget >= 4:
            assert keep.anchor[0].tolist() == sorted([*key, *others[: budget - 4]])
        else:
            assert set(keep.anchor[0].tolist()) <= set(key)


def test_at_least_one_token_stays():
    attention = torch.full((2, 9), 0.001)
    attention[:, 4] = 0.002
    method = vtc.create("mustdrop-llm", key="none", global_threshold=0.9, individual_threshold=0.9)
    assert method.stages()[0].decide(tokens_of(attention, torch.zeros(9))).anchor.tolist() == [[4]]


def test_text_before_the_image_does_not_vote():
    attention = torch.full((2, 6), 0.5)
    attention[1, :3] = 0.0
    tokens = tokens_of(attention, torch.zeros(6))
    method = vtc.create("mustdrop-llm", key="none", global_threshold=0.01, individual_threshold=0.1)
    tokens = vtc.Tokens(**{**vars(tokens), "signals": {**tokens.signals, "text_after": torch.tensor([[False, True]])}})
    assert method.stages()[0].decide(tokens).anchor.tolist() == [[3, 4, 5]]


def test_sites_and_eviction_of_the_paper_in_32_layers():
    stages = [stage.at_depth(32) for stage in vtc.create("mustdrop-llm").stages()]
    assert [stage.site.index for stage in stages] == [3, 7, 11, 15]
    assert [stage.evicts_from for stage in stages] == [None, None, None, 2]


@pytest.mark.parametrize(
    ("spec", "saw", "held"),
    [
        ("mustdrop-llm@1|2|3:2(evict=1, key=none)", [16, 8, 4, 2], [16, 2, 2, 2]),
        ("mustdrop-llm@2|3:4(evict=2)", [16, 16, 8, 4], [16, 16, 4, 4]),
        ("mustdrop-llm@2|3:4(evict=0)", [16, 16, 8, 4], [16, 16, 8, 4]),
    ],
)
def test_layers_and_caches(spec, saw, held):
    llava = tiny("llava")
    inputs = llava.inputs(PROMPTS)
    # thresholds that let everything pass: the ceilings alone decide
    method = vtc.parse(spec.replace("(", "(global_threshold=0.0, "))[0]
    with vtc.compress(llava.model, method) as handle, torch.no_grad():
        cache = names.cache_of(llava.model(**inputs, use_cache=True))
        report = handle.report
    assert report.per_layer == tuple((n, 2 * n, 0) for n in saw)
    assert report.kv_tokens == tuple((n, 2 * n, 0) for n in held)
    text = inputs["attention_mask"].sum(1) - torch.tensor([16, 32, 0])
    for layer, n in enumerate(held):
        expected = int((text + torch.tensor([n, 2 * n, 0])).max())
        assert cache.layers[layer].keys.shape[2] == expected


@pytest.mark.parametrize("positions", ["auto", "original"])
def test_decoding_after_eviction_equals_the_masked_model(llava, positions):
    """The prompt sees what entered each layer, later tokens what is left of it; positions go on in each layer."""
    inputs = llava.inputs(PROMPTS)
    method = vtc.parse("mustdrop-llm@1|2|3:2(evict=1, global_threshold=0.0)")[0]
    with vtc.compress(llava.model, method, positions=positions), torch.no_grad():
        out = llava.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    kept = tuple(dataclasses.replace(stage, leave=vtc.Drop()) for stage in method.stages())
    given = GivenStages(given=kept, budget=method.budget)
    with vtc.compress(llava.model, given, positions="renumber" if positions == "auto" else positions), torch.no_grad():
        cache = names.cache_of(llava.model(**inputs, use_cache=True))
    length, dense = inputs["input_ids"].shape[1], 3
    before, after = visible_columns(cache, length, dense), visible_columns(names.cache_of(out), length, dense)
    full = {
        **inputs,
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, dense), value=1),
    }
    valid = full["attention_mask"].bool()

    def seen(layer):
        rows = after(layer)[:, None].expand(-1, length + dense, -1).clone()
        rows[:, :length] = before(layer)[:, None]
        return rows

    def closed(layer):
        return ((before(layer) & valid).long().cumsum(1) - 1).clamp(min=0)

    renumbered = closed if positions == "auto" else None
    expected = masked_logits(llava.model, full, seen, layer_positions=renumbered)[:, length - 1 :]
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < 1e-5
    assert not torch.equal(before(1), after(1))


def test_no_budget_leaves_it_to_the_thresholds():
    llava = tiny("llava")
    inputs = llava.inputs(PROMPTS)
    counts = []
    for threshold in (0.0, 0.05, 0.2):
        spec = f"mustdrop-llm@2|3(global_threshold={threshold}, individual_threshold={threshold})"
        with vtc.compress(llava.model, spec) as handle, torch.no_grad():
            llava.model(**inputs)
            counts.append(sum(handle.report.after_last_cut))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 48 > counts[-1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 2)}, "ascending"),
        ({"evict": 1.5}, "evict=1.5"),
        ({"key": "last"}, "key='last'"),
        ({"key_share": 1.5}, "key_share=1.5"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("mustdrop-llm", **options)


def test_what_a_model_cannot_give_is_refused():
    with pytest.raises(errors.SpecError, match="no layer before 2"):
        vtc.patch(tiny("llava").model, "mustdrop-llm@1|2:4(evict=2)")
    with pytest.raises(errors.SignalUnavailableError, match=r"no \[CLS\]"):
        vtc.patch(tiny("paligemma").model, "mustdrop-llm:4")
