"""The worst difference between a compressed model and the masked full model, for every family: `vtc oracle`.

Real forwards of the tiny twins in fp32: the prompt and greedily decoded tokens, one and several samples, images, videos
and both, tokens dropped before the projector, at the LLM's input and inside it, eager and sdpa.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.engine.host import names
from vtc.engine.host.cache import layer_count
from vtc.testing.oracle import masked_logits, relative_difference, visible_columns
from vtc.testing.tiny import MIXED_PROMPTS, PROMPTS, VIDEO_PROMPTS, Prompt, TinyModel, families, tiny

#: the largest relative difference in fp32 that counts as equal (ours are near 1e-6)
LIMIT = 1e-4

#: one selection for every place where tokens leave; layer 3 is behind the DeepStack layers of the tiny Qwen3-VL
SPECS = (
    "random:5",
    "fastervlm:6(score=received)",
    "dart@3:5",
    "fastervlm:9(score=received) + random:7 + fastv@3:4",
)
ATTENTION = ("eager", "sdpa")
DECODED = 3


@dataclass(frozen=True)
class Worst:
    """The largest difference found on one family.

    Args:
        family: the family.
        difference: max |logits - expected| / max |expected|, over kept prompt positions and decoded tokens.
        case: where it was found.
        cases: how many were compared.
    """

    family: str
    difference: float
    case: str
    cases: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))


def worst_difference(family: str, specs: tuple[str, ...] = SPECS, attention: tuple[str, ...] = ATTENTION) -> Worst:
    """Compare every case of one family with the masked full model."""
    found: list[tuple[float, str]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on several
    try:
        for implementation in attention:
            one = tiny(family, implementation)
            for name, prompts in prompt_sets(one).items():
                inputs = one.inputs(prompts)
                found += [(_difference(one, inputs, spec), f"{implementation}, {name}, {spec}") for spec in specs]
    finally:
        torch.set_num_threads(threads)
    difference, case = max(found)
    return Worst(family, difference, case, len(found))


def oracle_table() -> tuple[Worst, ...]:
    """The worst difference of every family that `tiny` builds."""
    return tuple(worst_difference(family) for family in families())


def prompt_sets(one: TinyModel) -> dict[str, tuple[Prompt, ...]]:
    """Prompts of one and of several samples, with what the family can take."""
    sets: dict[str, tuple[Prompt, ...]] = {"one image": PROMPTS[:1], "images": PROMPTS}
    if one.has_video:
        sets |= {"videos": VIDEO_PROMPTS, "images and videos": MIXED_PROMPTS}
    return sets


def _difference(one: TinyModel, inputs: dict[str, Tensor], spec: str) -> float:
    return max(prefill_difference(one, inputs, spec), decoded_difference(one, inputs, spec))


def prefill_difference(one: TinyModel, inputs: dict[str, Tensor], spec: str) -> float:
    """The relative difference over the prompt positions that were kept; NaN counts as infinite."""
    import vtc

    length = inputs[names.INPUT_IDS].shape[1]
    with vtc.compress(one.model, spec, positions="original"), torch.no_grad():
        output = one.model(**inputs, use_cache=True)
    cache = names.cache_of(output)
    visible = visible_columns(cache, length)
    kept = visible(layer_count(cache) - 1) & inputs[names.ATTENTION_MASK].bool()
    return _finite(relative_difference(output.logits[kept], masked_logits(one.model, inputs, visible)[kept]))


def decoded_difference(one: TinyModel, inputs: dict[str, Tensor], spec: str) -> float:
    """The relative difference over greedily decoded tokens; NaN counts as infinite."""
    import vtc

    length = inputs[names.INPUT_IDS].shape[1]
    with vtc.compress(one.model, spec, positions="original"):
        output = _decode(one, inputs)
    new = output.sequences[:, length:]
    visible = visible_columns(names.cache_of(output), length, dense=new.shape[1] - 1)
    expected = masked_logits(one.model, one.extend(inputs, new[:, :-1]), visible)[:, length - 1 :]
    return _finite(relative_difference(torch.stack(output.logits, dim=1), expected))


def second_turn_difference(one: TinyModel, inputs: dict[str, Tensor], spec: str, words: int = 4) -> float:
    """The same after a second turn of `words` text tokens on the cache of a first one."""
    import vtc

    question = one.inputs([(words,)], seed=1)[names.INPUT_IDS].expand(len(inputs[names.INPUT_IDS]), -1)
    with vtc.compress(one.model, spec, positions="original"):
        first = _decode(one, inputs)
        answer = first.sequences[:, inputs[names.INPUT_IDS].shape[1] :]
        whole = one.extend(one.extend(inputs, answer), question)
        per_token = {name: value for name, value in whole.items() if value.shape == whole[names.INPUT_IDS].shape}
        cache = names.cache_argument(one.model, names.cache_of(first))
        output = _decode(one, per_token, **cache)
    start = whole[names.INPUT_IDS].shape[1]
    everything = one.extend(whole, output.sequences[:, start:-1])
    memory = names.cache_of(output)._vtc
    dense = everything[names.INPUT_IDS].shape[1] - memory.length
    visible = visible_columns(names.cache_of(output), memory.length, dense=dense)
    expected = masked_logits(one.model, everything, visible)[:, start - 1 :]
    return _finite(relative_difference(torch.stack(output.logits, dim=1), expected))


def _decode(one: TinyModel, inputs: dict[str, Tensor], **more: Any) -> Any:
    return one.model.generate(
        **inputs,
        **more,
        max_new_tokens=DECODED,
        do_sample=False,
        suppress_tokens=one.special,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _finite(difference: float) -> float:
    return difference if difference == difference else float("inf")
