"""`generate` of every family in all its modes, and later turns on the same cache, against the masked full model.

By default a chosen part runs; `pytest -m full tests/adapters` runs every prompt set, back end and spec.
"""

import functools
import subprocess
import sys

import pytest
import torch
from transformers import StaticCache, TextStreamer

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import contract, names
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS, VIDEO_PROMPTS, TinyModel

TOLERANCE = 1e-5
SPECIAL = [195, 196, 197, 198, 199]  # placeholders and their wrappers, which a trained model does not generate
SPECS = ("random:7 + fastv@3:4", "fastervlm:6(score=received)", "dart@3:5")
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "suppress_tokens": SPECIAL,
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}
MIXED = ((2, "video", 3, "image", 1, "image", 2), ("image", 2), (4,))
PROMPT_SETS = {
    "one": PROMPTS[:1],
    "ragged": PROMPTS,
    "one-video": VIDEO_PROMPTS[:1],
    "ragged-videos": VIDEO_PROMPTS,
    "mixed": MIXED,
}
VIDEO = tuple(name for name in families() if tiny(name).has_video)


def cases(*kinds):
    """Family, prompts, back end and spec: one of each kind by default, everything else marked `full`."""
    chosen = []
    for number, family in enumerate(families()):
        for kind in PROMPT_SETS:
            if ("video" in kind or kind == "mixed") and family not in VIDEO:
                continue
            for attention in ("sdpa", "eager"):
                for spec in SPECS:
                    by_default = kind in kinds and attention == ("sdpa", "eager")[number % 2] and spec == SPECS[0]
                    marks = () if by_default else (pytest.mark.full,)
                    name = "-".join((family, kind, attention, spec.split(":")[0]))
                    chosen.append(pytest.param(family, kind, attention, spec, marks=marks, id=name))
    return pytest.mark.parametrize(("family", "kind", "attention", "spec"), chosen)


@functools.cache
def built(family: str, attention: str = "sdpa", seed: int = 0) -> TinyModel:
    return tiny(family, attention, seed)


@functools.cache
def assistant(family, attention, seed):
    """A model of its own, also where it has the same weights: the patched one cannot assist itself."""
    return tiny(family, attention, seed).model


def generate(one, inputs, spec, **options):
    with vtc.compress(one.model, spec, positions="original"):
        return one.model.generate(**inputs, **{**GREEDY, **options})


def expected_logits(one, inputs, sequences, cache):
    """Logits of the masked full model at the generated places, teacher-forced on `sequences`."""
    batch, length = inputs["input_ids"].shape
    repeats = len(sequences) // batch
    prefilled = cache._vtc.length  # more than the prompt, where candidates stood behind it
    visible = visible_columns(cache, prefilled, dense=sequences.shape[1] - prefilled - 1)
    found = []
    for i in range(repeats):  # the i-th answer to each prompt
        rows = slice(i, None, repeats)
        of_cache = rows if len(visible(0)) == len(sequences) else slice(None)
        full = one.extend(inputs, sequences[rows, length:-1])
        found.append(masked_logits(one.model, full, lambda layer, of=of_cache: visible(layer)[of])[:, length - 1 :])
    return torch.stack(found, dim=1).flatten(0, 1)


@cases("ragged", "mixed")
def test_greedy(family, kind, attention, spec):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    out = generate(one, inputs, spec)
    expected = expected_logits(one, inputs, out.sequences, names.cache_of(out))
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < TOLERANCE
    expected[..., SPECIAL] = -torch.inf
    assert torch.equal(expected.argmax(-1), out.sequences[:, inputs["input_ids"].shape[1] :])
    held = [layer.keys.shape[2] for layer in names.cache_of(out).layers]
    assert min(held) < out.sequences.shape[1] - 1, "nothing was dropped"


@cases("ragged")
def test_sampling_draws_what_the_masked_model_draws(family, kind, attention, spec):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": 2}
    torch.manual_seed(3)
    out = generate(one, inputs, spec, **sampled)
    expected = expected_logits(one, inputs, out.sequences, names.cache_of(out))
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < TOLERANCE
    expected[..., SPECIAL] = -torch.inf
    torch.manual_seed(3)
    drawn = [torch.multinomial(step.softmax(-1), 1) for step in expected.unbind(1)]
    assert torch.equal(torch.cat(drawn, dim=1), out.sequences[:, inputs["input_ids"].shape[1] :])


@cases("ragged")
def test_beams(family, kind, attention, spec):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    out = generate(one, inputs, spec, num_beams=3, num_return_sequences=2, length_penalty=0.0)
    # beams share their prompt, so the cache of one answer to each prompt says what is visible
    greedy = generate(one, inputs, spec)
    expected = expected_logits(one, inputs, out.sequences, names.cache_of(greedy))
    # the host suppresses tokens after the softmax
    steps = expected.log_softmax(-1).gather(2, out.sequences[:, inputs["input_ids"].shape[1] :, None])
    torch.testing.assert_close(out.sequences_scores, steps[..., 0].sum(1), rtol=1e-4, atol=1e-4)
    best, second = out.sequences_scores.view(-1, 2).unbind(1)
    assert bool((best >= second).all())


@cases("one")
def test_candidates_of_the_prompt_and_of_an_assistant(family, kind, attention, spec):
    """Whoever guesses, the answer is that of greedy search; guesses stand in the prefill too, and are taken back."""
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    if len(PROMPT_SETS[kind]) > 1:
        pytest.skip("the host guesses for one prompt only")
    options = {"max_new_tokens": 9}
    greedy = generate(one, inputs, spec, **options)
    for name, candidates in (
        ("prompt", {"prompt_lookup_num_tokens": 3}),
        # the same weights guess right and are kept, others guess wrong and are cropped from the cache
        ("same", {"assistant_model": assistant(family, attention, 0)}),
        ("other", {"assistant_model": assistant(family, attention, 5)}),
    ):
        if family == "paligemma" and name != "prompt":
            with pytest.raises(errors.UnsupportedFeatureError, match="in the unpatched model, too"):
                generate(one, inputs, spec, **options, **candidates)
            continue
        out = generate(one, inputs, spec, **options, **candidates)
        assert torch.equal(out.sequences, greedy.sequences), name
        expected = expected_logits(one, inputs, out.sequences, names.cache_of(out))
        assert relative_difference(torch.stack(out.logits, dim=1), expected) < TOLERANCE, name


@pytest.mark.parametrize("family", families())
def test_lookup_that_finds_its_candidates_in_the_prompt(family):
    """The end of the prompt repeats its beginning, so candidates stand in the first forward already."""
    one = built(family)
    inputs = one.inputs([(6, "image", 6)])
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, :3]
    greedy = generate(one, inputs, SPECS[0], max_new_tokens=6)
    widths = []
    hook = one.model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    lookup = functools.partial(generate, one, inputs, SPECS[0], max_new_tokens=6, prompt_lookup_num_tokens=3)
    try:
        if family == "paligemma":
            with pytest.raises(errors.UnsupportedFeatureError, match="in the unpatched model, too"):
                lookup()
        else:
            assert torch.equal(lookup().sequences, greedy.sequences)
            assert widths[0] > inputs["input_ids"].shape[1]
    finally:
        hook.remove()


@pytest.mark.parametrize("family", families())
def test_streamer_sees_every_token(family):
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in ids)

    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    one, streamer = built(family), Collect(Tokenizer(), skip_prompt=True)
    inputs = one.inputs()
    out = generate(one, inputs, SPECS[0], streamer=streamer)
    assert streamer.text.split() == [str(int(t)) for t in out.sequences[0, inputs["input_ids"].shape[1] :]]


@pytest.mark.parametrize("family", families())
def test_text_only_prompts_pass_through_untouched(family):
    one = built(family)
    inputs = one.inputs([(6,), (4,)])
    stock = one.model.generate(**inputs, **GREEDY)
    with vtc.compress(one.model, SPECS[0], positions="original") as handle:
        patched = one.model.generate(**inputs, **GREEDY)
        with pytest.raises(errors.StateError, match="no report yet"):
            _ = handle.report
    assert torch.equal(stock.sequences, patched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, patched.logits, strict=True))


#: what the first and the second turn show
TURNS = {"text": ("image", None), "image": ("image", "image")}
VIDEO_TURNS = {
    "text-after-video": ("video", None),
    "video": ("video", "video"),
    "image-after-video": ("video", "image"),
    "video-after-image": ("image", "video"),
}


def turn_cases():
    chosen = []
    for number, family in enumerate(families()):
        for turn in (*TURNS, *(VIDEO_TURNS if family in VIDEO else ())):
            for attention in ("sdpa", "eager"):
                for spec in SPECS:
                    by_default = attention == ("eager", "sdpa")[number % 2] and spec == SPECS[0]
                    marks = () if by_default else (pytest.mark.full,)
                    name = "-".join((family, turn, attention, spec.split(":")[0]))
                    chosen.append(pytest.param(family, turn, attention, spec, marks=marks, id=name))
    return pytest.mark.parametrize(("family", "turn", "attention", "spec"), chosen)


@turn_cases()
def test_a_second_turn_on_the_same_cache(family, turn, attention, spec):
    one = built(family, attention)
    shown, then = {**TURNS, **VIDEO_TURNS}[turn]
    question = (3, shown, 5)
    # the pixels of the whole conversation; its text grows by the answer between the turns
    whole = one.inputs([(*question, *((then, 4) if then else (4,)))])
    first_length = one.inputs([question])["input_ids"].shape[1]
    first, new = split(one.inputs([question]), whole, first_length)
    later = {name: whole[name][:, first_length:] for name in PER_TOKEN if name in whole}
    if family == "paligemma":  # a later turn belongs to the suffix, which does not see what follows it
        later["token_type_ids"] = torch.ones_like(later["token_type_ids"])
    with vtc.compress(one.model, spec, positions="original") as handle:
        one_turn = one.model.generate(**first, **GREEDY)
        budget = handle.report.after_last_cut
        answered = one.extend(first, one_turn.sequences[:, first_length:])
        told = {name: torch.cat([answered[name], later[name]], dim=1) for name in later}
        given = {**told, **as_host_wants(one, new, whole)}
        if then and contract.is_older(adapter_for(one.model).later_pixels_since):
            with pytest.raises(errors.UnsupportedFeatureError, match="stock model reads pixels"):
                one.model.generate(**given, **names.cache_argument(one.model, names.cache_of(one_turn)), **GREEDY)
            return
        out = one.model.generate(**given, **names.cache_argument(one.model, names.cache_of(one_turn)), **GREEDY)
    start = told["input_ids"].shape[1]
    pixels = {name: value for name, value in whole.items() if name not in PER_TOKEN}
    everything = one.extend({**told, **pixels}, out.sequences[:, start:-1])
    length = everything["input_ids"].shape[1]
    memory = names.cache_of(out)._vtc
    visible = visible_columns(names.cache_of(out), memory.length, dense=length - memory.length)
    # the host counts a text turn on from the last frame's time, not from where the text before it stood
    positions = host_positions(one, first, told) if (family, turn) == ("qwen2_5_vl", "text-after-video") else None
    expected = masked_logits(one.model, everything, visible, position_ids=positions)[:, start - 1 :]
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < TOLERANCE
    ids = everything["input_ids"]
    is_visual = (ids == one.placeholder) | (ids == getattr(one, "video_placeholder", -1))
    kept = int((visible(3) & is_visual).sum())
    assert kept > sum(budget) if then else kept == sum(budget)
    assert kept < int(is_visual.sum())


def host_positions(one, first, told):
    """Positions of both turns as the unpatched model hands them to its language model."""
    found = []
    hook = one.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["position_ids"]), with_kwargs=True
    )
    cache = names.cache_of(one.model.generate(**first, **GREEDY))
    one.model.generate(**told, **names.cache_argument(one.model, cache), **GREEDY)
    hook.remove()
    return torch.cat([part.expand(4, -1, -1) for part in found], dim=-1)  # text, time, height, width


def split(first, whole, length):
    """The inputs of the first turn, and the pixels that the second one adds."""
    now, new = {}, {}
    for name, value in whole.items():
        if name in PER_TOKEN:
            now[name] = value[:, :length]
        elif name not in first:
            new[name] = value
        else:
            dim = next((d for d, (a, b) in enumerate(zip(first[name].shape, value.shape, strict=True)) if a != b), None)
            if dim is None:
                now[name] = value
            else:
                now[name], new[name] = value.tensor_split([first[name].shape[dim]], dim=dim)
    return now, new


def as_host_wants(one, new, whole):
    """What a second call of `generate` gets for `new` pixels.

    Qwen models compute positions from the grids of the whole conversation, but encode with the same argument; so the
    new pixels are encoded ahead.
    """
    if not any(name.endswith("grid_thw") for name in new):
        return new
    grids = {name: value for name, value in whole.items() if name.endswith("grid_thw")}
    inner, encoded = one.model.model, {}
    with torch.no_grad():
        if "pixel_values" in new:
            encoded["image"] = inner.get_image_features(new["pixel_values"], new["image_grid_thw"], return_dict=True)
        if "pixel_values_videos" in new:
            encoded["video"] = inner.get_video_features(
                new["pixel_values_videos"], new["video_grid_thw"], return_dict=True
            )
    return {**grids, "mm_encoder_outputs": encoded}


class TestRefusals:
    """What would be silently wrong raises before anything runs, in words that say what to do."""

    @pytest.mark.parametrize("family", families())
    def test_chunked_prefill(self, family):
        one = built(family)
        with pytest.raises(errors.VTCError, match=r"prefill_chunk_size.*prefill in one piece"):
            generate(one, one.inputs(), SPECS[0], prefill_chunk_size=8)

    @pytest.mark.parametrize("family", families())
    def test_static_cache(self, family):
        one = built(family)
        with pytest.raises(errors.UnsupportedFeatureError, match=r"default (Dynamic)?[cC]ache"):
            generate(one, one.inputs(), SPECS[0], cache_implementation="static")
        config = one.model.config.get_text_config()
        with (
            vtc.compress(one.model, SPECS[0], positions="original"),
            pytest.raises(errors.UnsupportedFeatureError, match="StaticCache"),
        ):
            one.model(
                **one.inputs(),
                **names.cache_argument(one.model, StaticCache(config=config, max_cache_len=200)),
                use_cache=True,
            )

    def test_an_assistant_that_is_patched_itself(self):
        one, helper = built("llava"), tiny("llava", seed=5).model
        with (
            vtc.compress(helper, SPECS[0], positions="original"),
            pytest.raises(errors.VTCError, match="assistant_model unpatched"),
        ):
            generate(one, one.inputs(), SPECS[0], assistant_model=helper)

    def test_cropping_into_dropped_tokens(self):
        one = built("llava")
        inputs = one.inputs()
        with vtc.compress(one.model, "random:7", positions="original"), torch.no_grad():
            cache = names.cache_of(one.model(**inputs, use_cache=True))
            whole = inputs["input_ids"].shape[1]
            cache.crop(-2)  # two of the five tokens behind the image
            assert cache.get_seq_length() == whole - 2
            step = torch.tensor([[7]])
            shorter = {name: value[:, :-2] for name, value in inputs.items() if name in PER_TOKEN}
            again = one.model(input_ids=step, **names.cache_argument(one.model, cache)).logits[:, -1]
            fresh = names.cache_of(one.model(**shorter, pixel_values=inputs["pixel_values"], use_cache=True))
            torch.testing.assert_close(
                again, one.model(input_ids=step, **names.cache_argument(one.model, fresh)).logits[:, -1]
            )
            with pytest.raises(errors.StateError, match="crop only what follows the last image"):
                cache.crop(-8)
            assert cache.get_seq_length() == whole - 1


class TestCompiled:
    """Compiled before the patch: refused. Compiled after it: the hooks run."""

    @pytest.fixture(autouse=True)
    def _clean_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("part", ["model", "inner", "layer"])
    def test_compiled_before(self, part):
        one = tiny("llava")
        model = one.model
        parts = {"model": model, "inner": model.model, "layer": model.model.language_model.layers[2]}
        parts[part].compile(backend="eager")
        with pytest.raises(errors.UnsupportedFeatureError, match=r"is compiled.*after the patch"):
            vtc.patch(model, SPECS[0])

    def test_a_compiled_function_that_ran_before(self):
        model = tiny("llava").model
        mlp = model.model.language_model.layers[2].mlp
        with torch.no_grad():
            torch.compile(mlp, backend="eager")(torch.ones(1, 2, 32))
        with pytest.raises(errors.UnsupportedFeatureError, match=r"LlamaMLP.*torch\._dynamo\.reset\(\) first"):
            vtc.patch(model, SPECS[0])
        torch._dynamo.reset()
        vtc.patch(model, SPECS[0]).remove()

    @pytest.mark.full
    def test_compiled_afterwards(self):
        """In a process of its own: the type checker of the tests cannot be traced."""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
        assert done.stdout.split() == ["True"] * 4, done.stderr


COMPILED = """
import torch, vtc
from vtc.testing import tiny
for spec in ("random:7 + fastv@3:4", "fastervlm:6"):
    one = tiny("llava")
    inputs = one.inputs()
    with torch.no_grad():
        full = one.model(**inputs).logits
        with vtc.compress(one.model, spec, positions="original"):
            expected = one.model(**inputs).logits
        handle = vtc.patch(one.model, spec, positions="original")
        compiled = torch.compile(one.model, backend="eager")
        compiled(**inputs)
        print(torch.equal(compiled(**inputs).logits, expected))
        handle.remove()
        print(torch.equal(compiled(**inputs).logits, full))
    torch._dynamo.reset()
"""
