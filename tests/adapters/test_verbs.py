"""Freezing, parking and eviction on every family, against the full model that leaves rows unchanged or hides them."""

import functools

import pytest
import torch

import vtc
from vtc.engine.host import names
from vtc.stages import Drop, Freeze, Park, Site, Stage, nothing
from vtc.testing import GivenStages, families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Budget

ATTENTION = ("eager", "sdpa")
SPECIAL = [196, 197, 198, 199]  # placeholders and their wrappers, which a trained model does not generate


@functools.cache
def built(family: str, attention: str):
    return tiny(family, attention, layers=5)


def first_five(tokens):
    index = torch.arange(max(tokens.budget)).expand(len(tokens.lengths), -1)
    return torch.where(index < torch.tensor(tokens.budget)[:, None], index, -1)


def steps(verb):
    """Where the verb acts; dropping starts behind the last layer that forbids it in some family."""
    budget = Budget(tokens=5)
    if verb == "freeze":
        return [Stage(Site("layer", k), nothing, leave=Freeze(), budget=Budget(ratio=1.0)) for k in (0, 2)]
    if verb == "park":
        return [Stage(Site("layer", 3), first_five, leave=Park(until=4), budget=budget)]
    return [Stage(Site("layer", 3), first_five, leave=Drop(evict=1), budget=budget)]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("verb", ["freeze", "park", "evict"])
@pytest.mark.parametrize("family", families())
def test_generation_equals_the_full_model(family, verb, attention):
    one = built(family, attention)
    inputs = one.inputs(PROMPTS)
    length = inputs["input_ids"].shape[1]
    with vtc.compress(one.model, GivenStages(given=tuple(steps(verb))), positions="original"), torch.no_grad():
        output = one.model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            suppress_tokens=SPECIAL,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = output.sequences[:, length:]
    full = one.extend(inputs, new[:, :-1])
    held = visible_columns(names.cache_of(output), length, dense=new.shape[1] - 1)
    total = full["input_ids"].shape[1]
    ids = full["input_ids"]
    is_visual = ids == one.placeholder

    def visible(layer):
        rows = held(layer)[:, None].expand(-1, total, -1).clone()
        if verb == "evict" and layer < 3:  # the prompt itself saw everything
            rows[:, :length, :length] = True
        return rows

    def unchanged(layer):
        if verb == "freeze":
            return is_visual & (layer in (0, 2))
        return is_visual & ~held(layer) if verb == "park" else torch.zeros_like(is_visual)

    expected = masked_logits(one.model, full, visible, unchanged=unchanged)[:, length - 1 :]
    assert relative_difference(torch.stack(output.logits, dim=1), expected) < 1e-5
