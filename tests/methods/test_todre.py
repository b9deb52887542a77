"""ToDRE against vectors made from the paper's algorithm, and its second stage (no official code exists)."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout, Tokens

CASES = golden_cases("todre", Path(__file__).parents[1] / "golden", kind="specderived")


@pytest.mark.parametrize("case", golden_cases("todre", Path(__file__).parents[1] / "golden"), ids=str)
def test_golden(case):
    assert case.name.startswith("specderived"), "a kind of case that no test reads"
    x, attention = case["in_tokens"][None], case["in_cls_attention"]
    layout = None
    if attention.dim() == 2:  # frames of a video: the pivot is looked for in all of them
        layout = Layout.grid(1, attention.shape[1], segments=attention.shape[0])
    method = vtc.create("todre", thumbnail=attention.dim() == 1)
    tokens = vtc.Tokens.of(x, case.number("param_k"), layout, cls_attention=attention.reshape(1, -1))
    assert torch.equal(method.picks(tokens)[0], case["out_selected_in_pick_order"])
    assert torch.equal(method.stages()[0].decide(tokens).anchor[0], case["out_keep_idx_sorted"])


def test_pivot_comes_from_the_thumbnail():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 6, generator=generator)
    attention = torch.arange(24.0)[None]
    layout = Layout.grid(2, 4, segments=3)
    first = {
        thumbnail: vtc.create("todre", thumbnail=thumbnail)
        .picks(vtc.Tokens.of(x, 4, layout, cls_attention=attention))[0, 0]
        .item()
        for thumbnail in (True, False)
    }
    assert first == {True: 7, False: 23}


@pytest.mark.parametrize("pivot", ["random", "nearest", "farthest"])
def test_pivots_without_cls(pivot):
    x = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0))
    likeness = normalize(x[0], dim=-1) @ normalize(x[0].mean(0), dim=-1)
    expected = {"nearest": likeness.argmax(), "farthest": likeness.argmin()}.get(pivot)
    method = vtc.create("todre", pivot=pivot)
    assert method.stages()[0].signals == ()
    first = method.picks(vtc.Tokens.of(x, 4))[0, 0]
    assert 0 <= first < 30
    assert expected is None or first == expected


def test_k_center_minimises_the_largest_similarity():
    x = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 40, generator=torch.Generator().manual_seed(1))
    tokens = vtc.Tokens.of(x, 9, cls_attention=attention)
    unit = normalize(x[0].double(), dim=-1)
    for objective, reduce in (("k_center", lambda s: s.amax(1)), ("max_sum", lambda s: s.sum(1))):
        picks = [int(attention.argmax())]
        while len(picks) < 9:
            score = reduce(unit @ unit[picks].T)
            score[picks] = torch.inf
            picks.append(int(score.argmin()))
        assert vtc.create("todre", objective=objective).picks(tokens)[0].tolist() == picks


def probed(to_vision, to_text, *, after=True, texts=4, visuals=5):
    """Two samples; text gives visual tokens `to_vision` of its attention in all, visual tokens give text `to_text`."""
    is_text = torch.arange(texts).expand(2, -1) < texts - 1
    return Tokens(
        torch.zeros(2, visuals, 3),
        (visuals, visuals - 2),
        signals={
            "text_attention": torch.tensor(to_vision)[:, None, None].expand(-1, texts, visuals)
            / torch.tensor([5, 3])[:, None, None],
            "attention_to_text": torch.tensor(to_text)[:, None, None].expand(-1, visuals, texts) / (texts - 1),
            "text_mask": is_text,
            "text_after": torch.full((2, texts), after),
        },
        budget=(visuals, visuals - 2),
    )


@pytest.mark.parametrize("after", [True, False])
def test_stage_2_asks_for_both_shares(after):
    (stage,) = vtc.create("todre", stage="2").stages()
    for to_vision, to_text, lengths in (
        ((0.09, 0.11), (0.0, 0.0), (0, 3)),
        ((0.11, 0.09), (0.0, 0.0), (5, 0)),
        ((0.01, 0.01), (0.11, 0.09), (5, 0)),
        ((0.01, 0.01), (0.01, 0.01), (0, 0)),
        ((0.2, 0.2), (0.2, 0.2), (5, 3)),
    ):
        token_map = stage.decide(probed(to_vision, to_text, after=after))
        assert token_map.lengths == lengths
        for anchor, n in zip(token_map.anchor.tolist(), lengths, strict=True):
            assert anchor[:n] == list(range(n))


def test_stage_2_counts_the_text_behind_the_image_alone():
    (stage,) = vtc.create("todre", stage="2").stages()
    tokens = probed((0.5, 0.5), (0.0, 0.0))
    attention = tokens.signals["text_attention"].clone()
    attention[:, 1:] = 0
    signals = {
        **tokens.signals,
        "text_attention": attention,
        "text_after": torch.tensor([False, True, True, True]).expand(2, -1),
    }
    assert stage.decide(Tokens(tokens.x, tokens.lengths, None, signals, 0, tokens.budget)).lengths == (0, 0)


def test_without_text_nothing_leaves():
    (stage,) = vtc.create("todre", stage="2").stages()
    tokens = probed((0.0, 0.0), (0.0, 0.0))
    signals = {**tokens.signals, "text_mask": torch.zeros(2, 4, dtype=torch.bool)}
    assert stage.decide(Tokens(tokens.x, tokens.lengths, None, signals, 0, tokens.budget)).lengths == (5, 3)


def test_the_papers_layer_is_the_28th_of_32():
    first, second = vtc.create("todre").stages()
    assert str(first.site) == "llm_in"
    assert second.at_depth(32).site.index == 28  # reads layer 27, the 28th, and acts behind it


def test_both_stages_in_a_model_equal_the_masked_model(llava):
    """With a threshold between the shares of two samples, one of them loses all visual tokens and one keeps them."""
    inputs = llava.inputs((*PROMPTS[:2], PROMPTS[0]))
    shares = {}
    for tau in (0.0, 1.1):
        with vtc.compress(llava.model, f"todre:6(tau={tau})") as handle, torch.no_grad():
            llava.model(**inputs)
            shares[tau] = handle.report.per_layer
    assert shares[0.0] == ((6, 12, 6),) * 4
    assert shares[1.1] == (*((6, 12, 6),) * 3, (0, 0, 0))
    seen = set()
    for tau in torch.linspace(0.05, 0.95, 19).tolist():
        with vtc.compress(llava.model, f"todre:6(tau={tau})") as handle, torch.no_grad():
            out = llava.model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            last = handle.report.per_layer[3]
        if last in seen:
            continue
        seen.add(last)
        length = inputs["input_ids"].shape[1]
        full = {
            **inputs,
            "input_ids": out.sequences[:, :-1],
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1),
        }
        visible = visible_columns(names.cache_of(out), length, 2)
        expected = masked_logits(llava.model, full, visible)[:, length - 1 :]
        assert relative_difference(torch.stack(out.logits, dim=1), expected) < 1e-5
    assert any(0 in last and max(last) > 0 for last in seen), seen


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stage": "3"}, "stage='3'"), ({"probe": 0.0}, "probe=0.0"), ({"probe": 2.5}, "probe=2.5")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(errors.SpecError, match=message):
        vtc.create("todre", **options)


def test_stage_2_alone_needs_neither_budget_nor_cls():
    qwen = tiny("qwen2_vl")
    inputs = qwen.inputs(PROMPTS)
    with vtc.compress(qwen.model, "todre(stage=2, tau=1.1)") as handle, torch.no_grad():
        qwen.model(**inputs)
        report = handle.report
    assert report.per_layer[2] == report.visual_tokens
    assert report.after_last_cut == (0, 0, 0)
