"""`generate` in all its modes, second turns and threads, against the masked full model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationMixin, StaticCache, TextStreamer

import vtc
from vtc.engine.host import names
from vtc.testing import masked_logits, relative_difference, visible_columns
from vtc.testing.tiny import PROMPTS

TOLERANCE = 1e-5
#: before it encoded images ahead of the prefill, `generate` mixed up the images of expanded prompts with several each
EXPANDS_GROUPS = hasattr(GenerationMixin, "_expand_multimodal_outputs")
EXPANDABLE = PROMPTS if EXPANDS_GROUPS else (PROMPTS[0], ("image", 6), PROMPTS[2])
SPECS = ["random:6", "fastv@2:4", "fastervlm:9 + fastv@2:4"]
COUNT = 4


def run(llava, inputs, spec, **options):
    options = {"max_new_tokens": COUNT, "do_sample": False, **options}
    with vtc.compress(llava.model, spec, positions="original"), torch.no_grad():
        return llava.model.generate(
            **inputs, return_dict_in_generate=True, output_logits=True, output_scores=True, **options
        )


def expected_logits(llava, inputs, prompts, sequences, cache):
    """Logits of the masked full model at the generated places, teacher-forced on `sequences`."""
    batch, length = inputs["input_ids"].shape
    repeats = sequences.shape[0] // batch
    images = torch.split(inputs["pixel_values"], [prompt.count("image") for prompt in prompts])
    dense = sequences.shape[1] - length - 1
    full = {
        "input_ids": sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(
            inputs["attention_mask"].repeat_interleave(repeats, 0), (0, dense), value=1
        ),
        "pixel_values": torch.cat([image for image in images for _ in range(repeats)]),
    }
    return masked_logits(llava.model, full, visible_columns(cache, length, dense))[:, length - 1 :]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], EXPANDABLE], ids=["one", "three"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}], ids=["greedy", "sampled"])
def test_logits_of_every_step(llava, spec, prompts, options):
    inputs = llava.inputs(prompts)
    torch.manual_seed(0)
    out = run(llava, inputs, spec, **options)
    expected = expected_logits(llava, inputs, prompts, out.sequences, names.cache_of(out))
    assert relative_difference(torch.stack(out.logits, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("spec", SPECS)
def test_beam_scores(llava, spec):
    inputs = llava.inputs(EXPANDABLE)
    out = run(llava, inputs, spec, num_beams=3, length_penalty=0.0)
    # beams share their prompt, so the cache of one beam per prompt says what is visible
    one = run(llava, inputs, spec)
    expected = expected_logits(llava, inputs, EXPANDABLE, out.sequences, names.cache_of(one))
    chosen = out.sequences[:, inputs["input_ids"].shape[1] :]
    scores = expected.log_softmax(-1).gather(2, chosen[..., None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_prompt_lookup_gives_the_greedy_tokens(llava, spec):
    inputs = llava.inputs()
    greedy = run(llava, inputs, spec, max_new_tokens=8)
    lookup = run(llava, inputs, spec, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup.sequences, greedy.sequences)


def test_streamer_sees_every_token(sdpa_llava):
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in ids)

    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Collect(Tokenizer(), skip_prompt=True)
    inputs = sdpa_llava.inputs()
    out = run(sdpa_llava, inputs, "random:6", streamer=streamer)
    assert streamer.text.split() == [str(int(t)) for t in out.sequences[0, inputs["input_ids"].shape[1] :]]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
def test_second_turn_on_the_same_cache(llava, spec, new_image):
    first = llava.inputs(PROMPTS[:1])
    second = llava.inputs([(3, "image", 2)] if new_image else [(5,)], seed=1)
    with vtc.compress(llava.model, spec, positions="original"), torch.no_grad():
        one = llava.model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([one.sequences, second["input_ids"]], dim=1)
        pixels = {"pixel_values": second["pixel_values"]} if new_image else {}
        two = llava.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **names.cache_argument(llava.model, names.cache_of(one)),
            **pixels,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    full = {"input_ids": two.sequences[:, :-1], "attention_mask": torch.ones_like(two.sequences[:, :-1])}
    full["pixel_values"] = torch.cat([first["pixel_values"], *pixels.values()])
    memory = names.cache_of(two)._vtc
    visible = visible_columns(names.cache_of(two), memory.length, full["input_ids"].shape[1] - memory.length)
    expected = masked_logits(llava.model, full, visible)[:, ids.shape[1] - 1 :]
    assert relative_difference(torch.stack(two.logits, dim=1), expected) < TOLERANCE
    if new_image:
        held = [(visible(layer) & (full["input_ids"] == llava.placeholder)).sum().item() for layer in (0, 3)]
        budget = {"random:6": [12, 12], "fastv@2:4": [32, 8], "fastervlm:9 + fastv@2:4": [18, 8]}[spec]
        assert held == budget


def test_text_only_prompts_pass_through_untouched(llava):
    inputs = llava.inputs(PROMPTS[2:])
    with torch.no_grad():
        before = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with vtc.compress(llava.model, "fastervlm:9 + fastv@2:4") as handle:
            after = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            with pytest.raises(vtc.errors.StateError, match="no report yet"):
                _ = handle.report
    assert torch.equal(before, after)


@pytest.mark.skipif(not EXPANDS_GROUPS, reason="this transformers takes no mm_encoder_outputs")
def test_features_encoded_once_serve_many_prompts(sdpa_llava):
    first, second = sdpa_llava.inputs(), sdpa_llava.inputs([(7, "image", 2)], seed=3)
    with vtc.compress(sdpa_llava.model, "fastervlm:6", positions="original"), torch.no_grad():
        encoded = sdpa_llava.model.model.get_image_features(first["pixel_values"], return_dict=True)
        for inputs in (first, second):
            ids = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            reused = sdpa_llava.model(**ids, mm_encoder_outputs={"image": encoded}).logits
            fresh = sdpa_llava.model(**ids, pixel_values=first["pixel_values"]).logits
            assert torch.equal(reused, fresh)


def test_threads_do_not_mix(sdpa_llava):
    batches = [sdpa_llava.inputs(PROMPTS[i : i + 1] * (i + 1), seed=i) for i in (0, 1)] * 4
    with vtc.compress(sdpa_llava.model, "fastervlm:9 + fastv@2:4"), torch.no_grad():

        def generate(inputs):
            return sdpa_llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)

        alone = [generate(inputs) for inputs in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(generate, batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_interleaved_generations_keep_their_own_state(sdpa_llava):
    model = sdpa_llava.model
    with vtc.compress(model, "random:5 + fastv@2:3", positions="original"), torch.no_grad():
        inputs = [sdpa_llava.inputs(PROMPTS[i : i + 1], seed=i) for i in (0, 1)]
        step = torch.tensor([[7]])
        alone = []
        for i in inputs:
            cache = names.cache_of(model(**i, use_cache=True))
            alone.append(model(input_ids=step, **names.cache_argument(model, cache)).logits)
        caches = [names.cache_of(model(**i, use_cache=True)) for i in inputs]
        mixed = [model(input_ids=step, **names.cache_argument(model, cache)).logits for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_a_copied_cache_goes_on_like_the_original(sdpa_llava):
    inputs = sdpa_llava.inputs()
    with vtc.compress(sdpa_llava.model, "random:5 + fastv@2:3"), torch.no_grad():
        cache = names.cache_of(sdpa_llava.model(**inputs, use_cache=True))
        twin = copy.deepcopy(cache)
        step = torch.tensor([[7]])
        first = sdpa_llava.model(input_ids=step, **names.cache_argument(sdpa_llava.model, cache)).logits
        assert cache.get_seq_length() == twin.get_seq_length() + 1
        assert torch.equal(
            sdpa_llava.model(input_ids=step, **names.cache_argument(sdpa_llava.model, twin)).logits, first
        )


class TestRefusals:
    """What would be silently wrong raises before anything runs."""

    def test_chunked_prefill(self, sdpa_llava):
        with (
            vtc.compress(sdpa_llava.model, "random:6"),
            pytest.raises(vtc.VTCError, match="prefill_chunk_size"),
        ):
            sdpa_llava.model.generate(**sdpa_llava.inputs(), max_new_tokens=2, prefill_chunk_size=8)

    def test_static_cache(self, sdpa_llava):
        inputs = sdpa_llava.inputs()
        with vtc.compress(sdpa_llava.model, "random:6"):
            with pytest.raises(vtc.errors.UnsupportedFeatureError, match="DynamicCache"):
                sdpa_llava.model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
            cache = StaticCache(config=sdpa_llava.model.config.text_config, max_cache_len=64)
            with pytest.raises(vtc.errors.UnsupportedFeatureError, match="StaticCache"):
                sdpa_llava.model(**inputs, **names.cache_argument(sdpa_llava.model, cache))

    def test_cache_of_another_patch(self, sdpa_llava):
        with vtc.compress(sdpa_llava.model, "random:6"), torch.no_grad():
            cache = names.cache_of(sdpa_llava.model(**sdpa_llava.inputs(), use_cache=True))
        with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(vtc.errors.StateError, match="another patch"):
            sdpa_llava.model(input_ids=torch.tensor([[7]]), **names.cache_argument(sdpa_llava.model, cache))

    def test_cache_expanded_after_the_prefill(self, sdpa_llava):
        with vtc.compress(sdpa_llava.model, "random:6"), torch.no_grad():
            cache = names.cache_of(sdpa_llava.model(**sdpa_llava.inputs(), use_cache=True))
            cache.batch_repeat_interleave(2)
            with pytest.raises(vtc.errors.StateError, match="made for 1 prompts"):
                sdpa_llava.model(input_ids=torch.tensor([[7], [8]]), **names.cache_argument(sdpa_llava.model, cache))

    @pytest.mark.skipif(not EXPANDS_GROUPS, reason="this transformers takes no mm_encoder_outputs")
    def test_features_of_another_patch(self, sdpa_llava):
        inputs = sdpa_llava.inputs()
        pixels = inputs.pop("pixel_values")
        stock = sdpa_llava.model.model.get_image_features(pixels, return_dict=True)
        with vtc.compress(sdpa_llava.model, "random:6"):
            with pytest.raises(vtc.errors.StateError, match="before the patch"):
                sdpa_llava.model(**inputs, mm_encoder_outputs={"image": stock})
            encoded = sdpa_llava.model.model.get_image_features(pixels, return_dict=True)
        with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(vtc.errors.StateError, match="another patch"):
            sdpa_llava.model(**inputs, mm_encoder_outputs={"image": encoded})

    def test_gradient_checkpointing(self, sdpa_llava):
        for layer in sdpa_llava.model.model.language_model.layers:
            layer.gradient_checkpointing = True
        sdpa_llava.model.train()
        with vtc.compress(sdpa_llava.model, "random:6"), pytest.raises(vtc.errors.UnsupportedFeatureError):
            sdpa_llava.model(**sdpa_llava.inputs(), use_cache=False)
