"""DART against the authors' code."""

import math
from pathlib import Path

import pytest
import torch

import vtc
from vtc.engine.host import names
from vtc.testing.end_to_end import replay
from vtc.testing.golden import golden_cases

FOLDER = Path(__file__).parents[1] / "golden"
CORE = [c for c in golden_cases("dart", FOLDER) if c.name.startswith(("llava", "qwen2vl"))]


def tokens_of(case, budget):
    start, count = case.number("image_token_start_index"), case.number("image_token_length")
    keys, state = case["keys"], case["state"]
    image, text = slice(start, start + count), slice(start + count, keys.shape[2])
    places = torch.arange(keys.shape[2])[None]
    is_text = torch.ones(1, keys.shape[2] - start - count, dtype=torch.bool)
    return vtc.Tokens.of(
        state[:, image],
        budget,
        keys=keys[:, :, image],
        normed_states=state[:, image],
        position=places[:, image],
        text_keys=keys[:, :, text],
        text_states=state[:, text],
        text_position=places[:, text],
        text_mask=is_text,
        text_after=is_text,
    )


@pytest.mark.parametrize("case", CORE, ids=str)
def test_golden(case):
    start, count = case.number("image_token_start_index"), case.number("image_token_length")
    most = case.number("max_num_trunction")
    if most > 0:
        budget = most
    elif case.name.startswith("llava"):
        budget = math.ceil(count * (1 - case.number("reduction_ratio")))
    else:
        budget = int(count * (1 - case.number("reduction_ratio")))
    method = vtc.create("dart", variant="reference", pivots=case.number("pivot_image_token"))
    tokens = tokens_of(case, budget)
    keep = method.stages()[0].decide(tokens).anchor[0]
    assert torch.equal(keep + start, case["retained_sorted"])


@pytest.mark.parametrize("case", golden_cases("dart", FOLDER, kind="tiny4l_e2e"), ids=str)
def test_golden_end_to_end(case):
    # image [6, 70), K = 2, max_num_trunction = 16; rms eps 1e-6, rope theta 1e4, 4 heads
    run = replay(case, (6, 70), list(case["decode_embeds"]), num_attention_heads=4, num_key_value_heads=4)
    with vtc.compress(run.model, vtc.create("dart", budget=16, variant="reference")) as handle:
        out = run.prefill(handle)
        lengths = [layer.keys.shape[2] for layer in names.cache_of(out).layers]
        kept = names.cache_of(out)._vtc.layers[-1].column[0]
        assert torch.equal(kept, case["keep_indexs"])
        assert lengths == case["prefill_cache_len_per_layer"].tolist()
        torch.testing.assert_close(out.last_hidden_state[:, kept], case["prefill_last_hidden"], atol=1e-5, rtol=1e-5)
        for step, expected in enumerate(case["decode_last_hidden"]):
            hidden = run.decode(step, names.cache_of(out)).last_hidden_state
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
