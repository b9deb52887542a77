"""PromptDistill against the authors' code, its caches against the oracle, and options that cannot be."""

from pathlib import Path

import pytest
import torch

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.kernels import attention_rows
from vtc.testing import masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.golden import golden_cases
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout

CASES = golden_cases("promptdistill", Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    ends, logits, hidden = case["prompt_ends"], case["raw_logits"], case["hidden_states"]
    row = attention_rows(case["q_end"][:, :, None], case["k"], softmax=False)[:, 0]
    torch.testing.assert_close(row, logits, atol=1e-6, rtol=1e-5)
    # everything before the last token of the prompt is a candidate there
    lengths, width, count = tuple(ends.tolist()), int(ends.max()), case.number("n_topk")
    tokens = vtc.Tokens(
        hidden[:, :width],
        lengths,
        signals={"query_logits": row[:, :width]},
        budget=tuple(min(count, n) for n in lengths),
    )
    pool = "line" if case.number("use_pooling") else "none"
    method = vtc.create("promptdistill", pool=pool, variant="reference")
    score = method.score(tokens)
    token_map = method.stages()[0].decide(tokens)
    for b, end in enumerate(lengths):
        torch.testing.assert_close(score[b, :end], case["pooled_logits"][b, :end], atol=1e-6, rtol=1e-5)
        kept = torch.cat([token_map.anchor[b, : token_map.lengths[b]], torch.tensor([end])])
        number = int(case["new_prompt_ends"][b]) + 1
        assert torch.equal(kept, case["truncation_idx"][b, :number])
        assert torch.equal(hidden[b, kept], case["out_hidden"][b, :number])
        assert torch.equal(kept, case["out_position_ids"][b, :number])
    if pool == "none":
        assert torch.equal(vtc.create("promptdistill", pool="none").filter(tokens), method.filter(tokens))


def test_missing_neighbours_do_not_count():
    logits = torch.tensor([[-4.0, -2.0, -3.0, -9.0, -8.0, -7.0, 99.0], [-1.0, -5.0, 99.0, 99.0, 99.0, 99.0, 99.0]])
    tokens = vtc.Tokens(torch.zeros(2, 7, 1), (7, 2), signals={"query_logits": logits[:, :7]}, budget=(2, 1))
    score = vtc.create("promptdistill").score(tokens)
    assert score[0, :2].tolist() == pytest.approx([-3.0, -4.5])
    assert score[1, :2].tolist() == pytest.approx([-3.0, -3.0])
    zeros = vtc.create("promptdistill", variant="reference").score(tokens)
    assert zeros[1, 0].item() == pytest.approx(-6 / 5)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_squares_of_the_grid(variant):
    generator = torch.Generator().manual_seed(0)
    layout = Layout.grid(3, 4, segments=2)
    logits = torch.randn(1, 25, generator=generator)
    # a separator between the two segments, and one token that an earlier stage dropped

    def separated(part):
        return torch.cat([part[:, :12], torch.full((1, 1), -1), part[:, 12:]], dim=1)

    keep = torch.tensor([[i for i in range(25) if i != 5]])
    layout = layout.map(separated).take(keep)
    tokens = vtc.Tokens(torch.zeros(1, 24, 1), (24,), layout, {"query_logits": logits.gather(1, keep)}, budget=(3,))
    score = vtc.create("promptdistill", pool="grid", variant=variant).score(tokens)[0]
    for i in range(24):
        row, col, segment = (part[0, i].item() for part in (layout.row, layout.col, layout.segment))
        if row < 0:
            expected = tokens.signal("query_logits")[0, i]
        else:
            near = (layout.row[0] - row).abs().le(1) & (layout.col[0] - col).abs().le(1) & (layout.row[0] >= 0)
            values = tokens.signal("query_logits")[0, near & (layout.segment[0] == segment)]
            expected = values.mean() if variant == "paper" else values.sum() / 9
        torch.testing.assert_close(score[i], expected)


def test_a_grid_is_needed_for_squares():
    tokens = vtc.Tokens.of(torch.zeros(1, 4, 1), 2, query_logits=torch.zeros(1, 4))
    with pytest.raises(errors.InputError, match="pool='line'"):
        vtc.create("promptdistill", pool="grid").score(tokens)


@pytest.mark.parametrize(
    ("spec", "per_layer", "held"),
    [
        ("promptdistill@2:5", (16, 16, 5, 5), (16, 16, 5, 5)),
        ("promptdistill@2:5(truncate_cache=-1)", (16, 16, 5, 5), (5, 5, 5, 5)),
        ("promptdistill@1|3:4(truncate_cache=1)", (16, 8, 8, 4), (8, 8, 8, 4)),
        ("promptdistill@1|3(truncate_cache=2, counts=9|4)", (16, 9, 9, 4), (9, 4, 4, 4)),
        ("promptdistill:3(truncate_cache=1, pool=grid)", (16, 16, 3, 3), (3, 3, 3, 3)),
    ],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_caches_hold_what_each_stage_chose(spec, per_layer, held, implementation):
    """The prompt sees all that enters a layer, the answer what the cache keeps; positions go on where the text is."""
    llava = tiny("llava", implementation)
    inputs = llava.inputs(PROMPTS)
    with vtc.compress(llava.model, spec) as handle, torch.no_grad():
        out = llava.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        report = handle.report
    assert [layer[0] for layer in report.per_layer] == list(per_layer)
    assert [layer[0] for layer in report.kv_tokens] == list(held)
    batch, length = inputs["input_ids"].shape
    dense = out.sequences.shape[1] - 1 - length
    after = visible_columns(names.cache_of(out), length, dense)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, dense), value=1)
    full = {**inputs, "input_ids": out.sequences[:, :-1], "attention_mask": mask}
    is_text = (full["input_ids"] != llava.placeholder)[:, :length]
    entered = [after(layer)[:, :length] for layer in range(4)]
    # where a cache was cut, the layer itself saw what the cache of the stage before holds, or everything
    for layer in range(4):
        if report.per_layer[layer] != report.kv_tokens[layer]:
            earlier = [k for k in range(layer) if report.kv_tokens[k] == report.per_layer[layer]]
            entered[layer] = after(earlier[-1])[:, :length] if earlier else torch.ones_like(is_text)

    def visible(layer):
        prompt = torch.nn.functional.pad(entered[layer], (0, dense))[:, None].expand(-1, length, -1)
        answer = after(layer)[:, None].expand(-1, dense, -1)
        return torch.cat([prompt, answer], dim=1)

    expected = masked_logits(llava.model, full, visible)[:, length - 1 :]
    # the last row of the prompt is one of those that saw everything
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < 1e-5
    assert batch == len(PROMPTS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (4, 4)}, "ascending"),
        ({"layers": (2, 4), "counts": (9,)}, "each of 2 stages"),
        ({"counts": (0,)}, "from 1 on"),
        ({"pool": "2d"}, "pool='2d'"),
        ({"truncate_cache": 2}, "truncate_cache=2"),
        ({"truncate_cache": -2}, "truncate_cache=-2"),
        ({"variant": "code"}, "variant='code'"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(errors.SpecError, match=says):
        vtc.create("promptdistill", budget=8, **options)
