"""What layers hold: entries leave any layer's cache while decoding, those of generated tokens too."""

import pytest
import torch

import vtc
from vtc.engine.handover import ATTRIBUTE
from vtc.engine.host import cache as host
from vtc.engine.host import names
from vtc.engine.llm.logical import remember
from vtc.testing.oracle import masked_logits, relative_difference, visible_columns
from vtc.testing.tiny import tiny

STEPS = 5
CUT_AFTER = 3  # generated tokens that are in the cache when entries leave it


@pytest.mark.parametrize("spec", ["random:6", "fastv@2:4", "fastervlm:9 + fastv@2:4"])
@pytest.mark.parametrize("layers", [(1,), (2, 3), (3,)], ids=str)
def test_entries_leave_while_decoding(spec, layers):
    """Equal to the full model whose later rows do not see the keys that left, layer by layer."""
    case = tiny("llava")
    inputs = case.inputs([(2, "image", 3), ("image", 4)])
    prompt = inputs[names.INPUT_IDS].shape[1]
    gone = torch.tensor([1, -2])  # of the entries of a layer: a visual token or text, and the last but one generated
    # with size_bias every layer has its own mask, though nothing is merged here
    with vtc.compress(case.model, spec, positions="original", size_bias=True), torch.no_grad():
        output = case.model(**inputs, use_cache=True)
        cache, mask, ids, logits = names.cache_of(output), inputs[names.ATTENTION_MASK], inputs[names.INPUT_IDS], []
        before = visible_columns(cache, prompt, dense=STEPS)
        for step in range(STEPS):
            if step == CUT_AFTER:
                memory = getattr(cache, ATTRIBUTE).grown(host.held_length(cache, 0))
                kept = {}
                for layer in layers:
                    entries = torch.arange(memory.layers[layer].entries)
                    stay = torch.ones_like(entries, dtype=torch.bool)
                    stay[gone] = False
                    kept[layer] = entries[stay].expand(2, -1), False
                remember(cache, memory.cut(cache, kept))
            token = output.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            output = case.model(
                input_ids=token, attention_mask=mask, **names.cache_argument(case.model, cache), use_cache=True
            )
            logits.append(output.logits[:, -1])
        after = visible_columns(cache, prompt + CUT_AFTER, dense=STEPS - CUT_AFTER)
        assert host.held_length(cache, layers[0]) == memory.layers[layers[0]].entries - 2 + STEPS - CUT_AFTER

    def visible(layer):
        late = (torch.arange(prompt + STEPS) >= prompt + CUT_AFTER)[None, :, None]
        return torch.where(late, after(layer)[:, None], before(layer)[:, None])

    full = {**inputs, names.INPUT_IDS: ids, names.ATTENTION_MASK: mask}
    expected = masked_logits(case.model, full, visible)[:, prompt:]
    assert relative_difference(torch.stack(logits, dim=1), expected) < 1e-5
    changed = [layer for layer in range(4) if not torch.equal(before(layer), after(layer))]
    assert changed == list(layers), "the entries left other layers"


def test_what_is_cut_twice_is_counted_once():
    """A memory that was cut covers everything up to the cut, and grows from there."""
    case = tiny("llava")
    inputs = case.inputs([("image", 4)])
    with vtc.compress(case.model, "random:6"), torch.no_grad():
        output = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = names.cache_of(output)
        held = host.held_length(cache, 0)
        memory = getattr(cache, ATTRIBUTE).grown(held)
        cut = memory.cut(cache, {1: (torch.arange(held - 1)[None], False)})
        assert cut.length == memory.length
        assert cut.reference.entries == held
        assert cut.layers[1].entries == held - 1
        assert cut.grown(held) is cut
        assert cut.grown(held + 2).layers[1].columns[0, -3:].tolist() == [
            memory.length - 2, memory.length, memory.length + 1
        ]  # fmt: skip
        assert cut.grown(held + 2).layers[1].places[0, -2:].tolist() == [held, held + 1]
