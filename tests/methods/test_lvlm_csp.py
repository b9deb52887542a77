"""LVLM_CSP: its selectors, its ranges of layers, and options that cannot be (there is no published code)."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.stages import Signal
from vtc.testing import tiny, visible_columns
from vtc.testing.tiny import PROMPTS

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


def clusters(tokens, **options):
    return vtc.create("lvlm-csp", **options).stages()[0].decide(tokens).anchor


def test_uniform_selector():
    for count in (1, 4, 5, 16):
        expected = [i * (16 // count) for i in range(count)]
        assert clusters(vtc.Tokens.of(X, count)).tolist() == [expected] * 2


def test_cls_selector():
    attention = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    keep = clusters(vtc.Tokens.of(X, 5, cls_attention=attention), selector="cls")
    assert torch.equal(keep, attention.topk(5).indices.sort().values)


def test_random_selector_is_seeded():
    drawn = [clusters(vtc.Tokens.of(X, 5), selector="random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0][0].unique()) == 5


def test_pruning_follows_the_query():
    attention = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    for query in ("last", "text"):
        stage = vtc.create("lvlm-csp", query=query).stages()[1]
        assert stage.signals == (Signal("query_attention", rows=query),)
        keep = stage.decide(vtc.Tokens.of(X, 6, query_attention=attention)).anchor
        assert torch.equal(keep, attention.topk(6).indices.sort().values)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lvlm-csp:3", [4, 16, 3, 3]),
        ("lvlm-csp@1|2|3:5(clusters=0.5)", [16, 8, 16, 5]),
        ("lvlm-csp@0|0.75|0.75:2", [4, 4, 4, 2]),
        ("lvlm-csp:3(clusters=1.0)", [16, 16, 3, 3]),
    ],
)
def test_tokens_in_each_range(spec, expected):
    llava = tiny("llava")
    inputs = llava.inputs(PROMPTS)
    with vtc.compress(llava.model, spec) as handle, torch.no_grad():
        cache = names.cache_of(llava.model(**inputs, use_cache=True))
        report = handle.report
    assert report.per_layer == tuple((n, 2 * n, 0) for n in expected)
    assert report.kv_tokens == report.per_layer
    visible = visible_columns(cache, inputs["input_ids"].shape[1])
    is_visual = inputs["input_ids"] == llava.placeholder
    for layer, n in enumerate(expected):
        assert (visible(layer) & is_visual).sum(1).tolist() == [n, 2 * n, 0]


def test_parked_rows_come_back_bit_for_bit():
    llava = tiny("llava")
    inputs = llava.inputs()
    layers = llava.model.model.language_model.layers
    seen = {}
    with vtc.compress(llava.model, "lvlm-csp@1|3|3:4"), torch.no_grad():
        # behind the handle's own hooks: what the layers really get
        hooks = [
            layers[index].register_forward_pre_hook(lambda module, args, index=index: seen.update({index: args[0]}))
            for index in (1, 2)
        ]
        hooks.append(layers[0].register_forward_hook(lambda module, args, output: seen.update(left=output)))
        hooks.append(layers[3].register_forward_pre_hook(lambda module, args: seen.update(back=args[0]), prepend=True))
        llava.model(**inputs)
        for hook in hooks:
            hook.remove()
    columns = (inputs["input_ids"][0] == llava.placeholder).nonzero()[:, 0].tolist()
    parked = [column for i, column in enumerate(columns) if i % 4]
    text = inputs["input_ids"].shape[1] - 16
    assert seen[1].shape[1] == seen[2].shape[1] == text + 4
    assert seen["back"].shape[1] == text + 4
    with vtc.compress(llava.model, "lvlm-csp@1|2|3:15"), torch.no_grad():
        hook = layers[2].register_forward_pre_hook(lambda module, args: seen.update(back=args[0]))
        llava.model(**inputs)
        hook.remove()
    assert torch.equal(seen["back"][0, parked], seen["left"][0, parked])
    others = [column for column in range(text + 16) if column not in parked]
    assert not torch.equal(seen["back"][0, others], seen["left"][0, others])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 2)}, "clustering, scattering and pruning"),
        ({"clusters": 0.0}, "clusters=0.0"),
        ({"selector": "segments"}, "selector='segments'"),
        ({"query": "seg"}, "query='seg'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("lvlm-csp", **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lvlm-csp@2|1|3:4", "come back before a layer in 3..3"),
        ("lvlm-csp@0|2|1:4", "tokens parked until layer 2"),
        ("lvlm-csp@0|2|4:4", r"layers 1\.\.3"),
    ],
)
def test_ranges_that_a_model_does_not_have(spec, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.patch(tiny("llava").model, spec)
