"""What decoder layers receive under flash attention: shapes, masks, positions, and what flash attention makes of them.

No GPU with flash attention was at hand. For the length of a test transformers knows a stand-in that takes what flash
attention takes (no mask, or a 2-D mask of the keys), reads it as transformers' integration does (padding is cut out
before the kernel, queries are aligned with the last keys, gaps in position ids are packed sequences), and computes
each sequence by itself. The oracle is a twin with the same weights and stock attention.
"""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import modeling_flash_attention_utils as integration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

NAME = "flash_stand_in"
#: prompts of the other two see themselves in both directions, for which transformers has no flash attention
CAUSAL = tuple(family for family in families() if family not in ("gemma3", "paligemma"))
GREEDY = {
    "max_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": [195, 196, 197, 198, 199],
    "return_dict_in_generate": True,
    "output_logits": True,
}
SPECS = ["random:6", "random:7 + dart@3:4", "fastervlm:6(score=received) + fastv@3:4"]


@dataclass
class StandIn:
    """Computes attention as flash attention would, and notes what it got."""

    calls: list = field(default_factory=list)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, position_ids=None, **_):
        batch, _, queries, width = query.shape
        keys = key.shape[2]
        self.calls.append((module.layer_idx, queries, keys, attention_mask, position_ids))
        assert not integration._is_packed_sequence(position_ids, batch), "read as packed sequences"
        if attention_mask is not None:
            assert attention_mask.shape == (batch, keys), (attention_mask.shape, keys)
            assert not attention_mask.is_floating_point()
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        out = torch.zeros_like(query)
        for sample in range(batch):
            valid = torch.ones(keys).bool() if attention_mask is None else attention_mask[sample].bool()
            rows = valid[-queries:]  # padded queries are cut out like keys, and come back as zeros
            q, k, v = query[sample][:, rows], key[sample][:, valid], value[sample][:, valid]
            last = torch.arange(k.shape[1]) <= torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
            logits = (q @ k.transpose(1, 2) * (scaling or width**-0.5)).masked_fill(~last, -torch.inf)
            out[sample][:, rows] = logits.softmax(-1) @ v
        return out.transpose(1, 2), None


@pytest.fixture
def stand_in(monkeypatch):
    attention = StandIn()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, flash_attention_mask)
    return attention


def with_flash(family):
    one = tiny(family)
    one.model.config.get_text_config()._attn_implementation = NAME
    return one


@pytest.mark.parametrize("family", CAUSAL)
def test_the_stand_in_equals_stock_attention(family, stand_in):
    one, twin = with_flash(family), tiny(family)
    inputs = one.inputs(PROMPTS)
    with torch.no_grad():
        found, expected = one.model(**inputs).logits, twin.model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert stand_in.calls
    assert relative_difference(found[valid], expected[valid]) < 1e-5


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, (("image", 3),)], ids=["one", "ragged", "image-first"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", CAUSAL)
def test_generation(family, spec, prompts, stand_in):
    one, twin = with_flash(family), tiny(family)
    inputs = one.inputs(prompts)
    length = inputs["input_ids"].shape[1]
    with vtc.compress(one.model, spec, positions="original"):
        out = one.model.generate(**inputs, **GREEDY)
    new = out.sequences[:, length:]
    visible = visible_columns(names.cache_of(out), length, dense=new.shape[1] - 1)
    expected = masked_logits(twin.model, one.extend(inputs, new[:, :-1]), visible)[:, length - 1 :]
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < 1e-5
    held = [layer.column.shape[1] for layer in names.cache_of(out)._vtc.layers]
    prefill = stand_in.calls[: len(held)]
    assert [keys for _, _, keys, _, _ in prefill] == held
    assert all(queries == keys for _, queries, keys, _, _ in prefill)
    ragged = [bool((layer.column < 0).any()) for layer in names.cache_of(out)._vtc.layers]
    assert [mask is not None for *_, mask, _ in prefill] == ragged, "a mask exactly where something is padding"


@pytest.mark.parametrize("then", ["text", "image"])
@pytest.mark.parametrize("family", [name for name in CAUSAL if not name.startswith("qwen")])
def test_a_second_turn(family, then, stand_in):
    """Several new queries on a cache: gaps between their positions must not be read as sequences of their own."""
    one, twin = with_flash(family), tiny(family)
    first = one.inputs([(3, "image", 4)])
    second = one.inputs([("image", 3)] if then == "image" else [(5,)], seed=1)
    with vtc.compress(one.model, SPECS[1], positions="original"), torch.no_grad():
        cache = names.cache_of(one.model(**first, use_cache=True))
        width = first["input_ids"].shape[1]
        pixels = {name: value for name, value in second.items() if name.startswith(("pixel", "image_sizes"))}
        output = one.model(input_ids=second["input_ids"], **names.cache_argument(one.model, cache), **pixels)
    whole = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for name in pixels.keys() | (first.keys() - whole.keys()):
        whole[name] = torch.cat([part[name] for part in (first, second) if name in part], dim=tiles_dim(family, name))
    memory = names.cache_of(output)._vtc
    length = whole["input_ids"].shape[1]
    visible = visible_columns(names.cache_of(output), memory.length, dense=length - memory.length)
    expected = masked_logits(twin.model, whole, visible)[:, width:]
    kept = visible(3)[:, width:]
    assert relative_difference(output.logits[kept], expected[kept]) < 1e-5


def tiles_dim(family, name):
    """Idefics and SmolVLM stack the tiles of a prompt in dimension 1."""
    return int(family in ("idefics3", "smolvlm") and name == "pixel_values")


def test_positions_would_have_been_misread():
    """The reason for leaving position ids out."""
    gaps = torch.tensor([[0, 1, 5, 9, 10]])
    assert integration._is_packed_sequence(gaps, 1)
    assert not integration._is_packed_sequence(None, 1)


def test_switching_the_attention_under_a_patch(stand_in):
    one = tiny("llava")
    with vtc.compress(one.model, "random:6"):
        one.model.config.get_text_config()._attn_implementation = NAME
        with pytest.raises(errors.StateError, match="patch again"):
            one.model(**one.inputs())
