"""FiCoCo-L against the authors' code."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc.methods.ficoco_l import DIFFERENCES
from vtc.testing import tiny
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
LLM = golden_cases("ficoco", FOLDER, kind="l_")


def test_there_are_recorded_cases():
    assert LLM


def edges(method, tokens):
    """Which tokens go, and where to with which weight: [r] and [r, K] twice."""
    keep = method.filter(tokens)
    links = method.correlate(tokens, keep)
    count = links.source.shape[1] // (tokens.x.shape[1] - keep.shape[1])
    return keep, *(part[0].view(-1, count) for part in links)


@pytest.mark.parametrize("case", LLM, ids=str)
def test_golden_llm(case):
    count, r = case.number("n_visual"), case.number("r")
    q, k, hidden = case["q"][None], case["k"][None], case["hidden_visual"]
    text = q.shape[2] - count
    signals = {
        "queries": q[:, :, :count],
        "keys": k[:, :, :count],
        "text_queries": q[:, :, count:],
        "text_keys": k[:, :, count:],
        "text_mask": torch.ones(1, text, dtype=torch.bool),
        "text_after": torch.ones(1, text, dtype=torch.bool),
    }
    tokens = vtc.Tokens.of(hidden, count - r, **signals)
    method = vtc.create("ficoco-l", variant="reference")
    score = method.redundancy(tokens)[0]
    torch.testing.assert_close(score, case["filter_score"], atol=1e-4, rtol=1e-5)
    keep, source, slot, weight = edges(method, tokens)
    assert torch.equal(keep, case["remain_indices"])
    merged = case["merge_indices"][0]
    assert source[:, 0].tolist() == sorted(merged.tolist())
    order = merged.argsort()
    value = case["top_values_of_merged"] / case["top_values_of_merged"].sum(dim=1, keepdim=True)
    for row, (targets, values) in enumerate(zip(case["target_indices"][0][order].tolist(), value[order], strict=True)):
        for place, token in enumerate(targets):
            stays = (keep[0] == token).nonzero()
            assert slot[row, place] == (int(stays) if len(stays) else -1)
            if len(stays):
                torch.testing.assert_close(weight[row, place], values[place], atol=1e-5, rtol=1e-5)
    features = method.stages()[0].decide(tokens).apply(hidden)
    torch.testing.assert_close(features, case["out_hidden_visual"], atol=1e-5, rtol=1e-5)


def test_every_difference_is_an_option_of_its_own():
    """Each one alone changes a figure, and the reference options together are the reference."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"queries": 600, "keys": 600, "text_queries": 5, "text_keys": 5}
    signals = {name: torch.randn(1, 2, n, 4, generator=generator) for name, n in shapes.items()}
    signals["keys"][:, :, 0] = signals["queries"].mean(dim=2)  # the first token is redundant
    signals["queries"][:, :, 0] = 3 * signals["keys"].sum(dim=2)
    text = torch.ones(1, 5, dtype=torch.bool)
    x = torch.randn(1, 600, 4, generator=generator)
    tokens = vtc.Tokens.of(x, 400, **signals, text_after=text, text_mask=text)

    def features(**options):
        return vtc.create("ficoco-l", **options).stages()[0].decide(tokens).apply(x)

    paper, reference = features(), features(variant="reference")
    for name, (first, second) in DIFFERENCES.items():
        assert torch.equal(features(**{name: first}), paper)
        assert not torch.equal(features(**{name: second}), paper)
    assert torch.equal(features(**{name: second for name, (_, second) in DIFFERENCES.items()}), reference)
    assert not torch.equal(features(), features(attention="softmax"))
    with pytest.raises(vtc.VTCError, match="merge"):
        vtc.create("ficoco-l", merge="max")


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_merges_inside_the_layer_or_behind_it(half):
    (stage,) = vtc.create("ficoco-l", layer=2, half=half).stages()
    assert stage.site.before_mlp == (half == "attention")
    one, found = tiny("llava"), {}
    mlp = one.model.model.language_model.layers[1].mlp
    hook = mlp.register_forward_hook(lambda module, args, output: found.update(rows=args[0].shape[1]))
    with vtc.compress(one.model, vtc.create("ficoco-l", layer=2, budget=4, half=half)) as handle, torch.no_grad():
        one.model(**one.inputs())
    hook.remove()
    assert [n for (n,) in handle.report.per_layer] == [16, 16, 10, 4]
    assert found["rows"] == 8 + (10 if half == "attention" else 16)


def test_text_behind_the_image_counts_and_all_where_none_follows():
    generator = torch.Generator().manual_seed(0)
    shapes = {"queries": 9, "keys": 9, "text_queries": 4, "text_keys": 4}
    signals = {name: torch.randn(2, 2, n, 4, generator=generator) for name, n in shapes.items()}
    after = torch.tensor([[False, False, True, True], [False] * 4])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    tokens = vtc.Tokens.of(torch.randn(2, 9, 4), 3, **signals, text_after=after, text_mask=mask)
    found = vtc.create("ficoco-l", beta=0.0).redundancy(tokens)
    scale = 4**-0.5
    for b, rows in enumerate(([2, 3], [0, 1, 2])):
        logits = signals["queries"][b] @ signals["text_keys"][b][:, rows].transpose(1, 2) * scale
        torch.testing.assert_close(found[b], -logits.mean(dim=(0, 2)), atol=1e-5, rtol=1e-4)


def test_correlation_goes_by_way_of_the_text():
    """gamma = 0: only what text that a token sees gives others matters."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"queries": 8, "keys": 8, "text_queries": 3, "text_keys": 3}
    signals = {name: torch.randn(1, 1, n, 4, generator=generator) for name, n in shapes.items()}
    text = torch.ones(1, 3, dtype=torch.bool)
    tokens = vtc.Tokens.of(torch.randn(1, 8, 4), 7, **signals, text_after=text, text_mask=text)
    method = vtc.create("ficoco-l", gamma=0.0, attention="softmax")
    keep, source, slot, weight = edges(method, tokens)
    (gone,) = source[:, 0].tolist()
    to_text = (signals["queries"][0, 0, gone] @ signals["text_keys"][0, 0].T / 2).softmax(0)
    from_text = (signals["text_queries"][0, 0] @ signals["keys"][0, 0].T / 2).softmax(1)
    by_text = to_text @ from_text
    by_text[gone] = 0
    assert keep[0, slot[0, 0]] == by_text.argmax()
    assert weight[0, 0] == 1
