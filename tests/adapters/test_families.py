"""Every family against the masked full model: at the LLM's input, at a layer, while generating; and its layout."""

import copy
import functools
import importlib
import inspect

import pytest
import torch

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.methods.fastervlm import FasterVLM
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS, VIDEO_PROMPTS, TinyModel
from vtc.tokens import Budget

ATTENTION = ("eager", "sdpa")
VIDEO = tuple(name for name in families() if tiny(name).has_video)
PROMPT_SETS = {"one": PROMPTS[:1], "ragged": PROMPTS, "one-video": VIDEO_PROMPTS[:1], "ragged-videos": VIDEO_PROMPTS}
CASES = [(name, kind) for name in families() for kind in ("one", "ragged")]
CASES += [(name, kind) for name in VIDEO for kind in ("one-video", "ragged-videos")]
SPECIAL = [196, 197, 198, 199]  # placeholders and their wrappers, which a trained model does not generate

of_every_case = pytest.mark.parametrize(("family", "kind"), CASES, ids=["-".join(case) for case in CASES])


@functools.cache
def built(family: str, attention: str = "sdpa") -> TinyModel:
    return tiny(family, attention)


def prefill(model, inputs, spec, **options):
    with vtc.compress(model, spec, positions="original", **options) as handle, torch.no_grad():
        return model(**inputs, use_cache=True), handle.report


@pytest.mark.parametrize("attention", ATTENTION)
@of_every_case
@pytest.mark.parametrize("spec", ["random:5", "fastv@3:4", "dart@3:5", "uniform:6 + fastv@3:3"])
def test_logits_equal_the_masked_model(family, kind, attention, spec):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    length = inputs["input_ids"].shape[1]
    output, report = prefill(one.model, inputs, spec)
    cache = names.cache_of(output)
    visible = visible_columns(cache, length)
    expected = masked_logits(one.model, inputs, visible)
    kept = visible(3) & inputs["attention_mask"].bool()
    assert relative_difference(output.logits[kept], expected[kept]) < 1e-5
    ids = inputs["input_ids"]
    is_visual = (ids == one.placeholder) | (ids == getattr(one, "video_placeholder", -1))
    for layer, lengths in enumerate(report.per_layer):
        assert lengths == tuple((visible(layer) & is_visual).sum(1).tolist())
        assert cache.layers[layer].keys.shape[2] == int((visible(layer) & inputs["attention_mask"].bool()).sum(1).max())
    assert sum(report.per_layer[-1]) < sum(report.visual_tokens)


@pytest.mark.parametrize("attention", ATTENTION)
@of_every_case
def test_generated_tokens_equal_the_masked_model(family, kind, attention):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    length = inputs["input_ids"].shape[1]
    with vtc.compress(one.model, "random:7 + fastv@3:4", positions="original"):
        output = one.model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=SPECIAL,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = output.sequences[:, length:]
    visible = visible_columns(names.cache_of(output), length, dense=new.shape[1] - 1)
    expected = masked_logits(one.model, one.extend(inputs, new[:, :-1]), visible)[:, length - 1 :]
    assert relative_difference(torch.stack(output.logits, dim=1), expected) < 1e-5
    expected[..., SPECIAL] = -torch.inf
    assert torch.equal(expected.argmax(-1), new)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("family", families())
def test_a_second_turn_equals_the_masked_model(family, kind, attention):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": SPECIAL, "return_dict_in_generate": True}
    with vtc.compress(one.model, "random:7 + fastv@3:4", positions="original"):
        first = one.model.generate(**inputs, **options)
        answered = one.extend(inputs, first.sequences[:, length:])
        question = torch.randint(5, 150, (len(first.sequences), 4), generator=torch.Generator().manual_seed(1))
        whole = one.extend(answered, question)
        told = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in whole}
        second = one.model.generate(
            **told, **names.cache_argument(one.model, names.cache_of(first)), output_logits=True, **options
        )
    start = whole["input_ids"].shape[1]
    everything = one.extend(whole, second.sequences[:, start:-1])
    visible = visible_columns(names.cache_of(second), length, dense=everything["input_ids"].shape[1] - length)
    expected = masked_logits(one.model, everything, visible)[:, start - 1 :]
    assert relative_difference(torch.stack(second.logits, dim=1), expected) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
@of_every_case
def test_nothing_changes_under_a_covering_budget_and_after_remove(family, kind, attention):
    one = built(family, attention)
    inputs = one.inputs(PROMPT_SETS[kind])
    with torch.no_grad():
        expected = one.model(**inputs).logits
        before = {name for module in one.model.modules() for name in vars(module)}
        handle = vtc.patch(one.model, "random:999 + fastervlm:999(score=received) + fastv@3:999")
        assert torch.equal(one.model(**inputs).logits, expected)
        handle.remove()
        handle = vtc.patch(one.model, "fastervlm:3(score=received) + fastv@3:2")
        one.model(**inputs)
        handle.remove()
        assert torch.equal(one.model(**inputs).logits, expected)
    assert {name for module in one.model.modules() for name in vars(module)} == before
    assert not any(m._forward_pre_hooks for m in adapter_for(one.model).layers)


@of_every_case
def test_layout_has_a_place_for_every_slot(family, kind):
    one = built(family)
    inputs = one.inputs(PROMPT_SETS[kind])
    placeholder = one.video_placeholder if "video" in kind else one.placeholder
    _, report = prefill(one.model, inputs, "random:2")
    layout, total = report.layout, 0
    for group, grids in enumerate(layout.grids):
        row, col, segment = layout.row[group], layout.col[group], layout.segment[group]
        on_grid = segment >= 0
        assert torch.equal(on_grid, row >= 0)
        assert torch.equal(on_grid, col >= 0)
        places = list(zip(segment[on_grid].tolist(), row[on_grid].tolist(), col[on_grid].tolist(), strict=True))
        assert len(set(places)) == len(places)
        assert {s for s, _, _ in places} == set(range(len(grids)))
        assert all(r < grids[s][0] and c < grids[s][1] for s, r, c in places)
        total += len(places)
    separators = int((inputs["input_ids"] == placeholder).sum()) - total
    assert separators == SEPARATORS.get((family, kind), 0)


#: newlines and [CLS] tokens among the slots of the tiny prompts
SEPARATORS = {
    ("llava_next", "one"): 4,
    ("llava_next", "ragged"): 4 + 6 + 8,
    ("llava_next_video", "one"): 4,
    ("llava_next_video", "ragged"): 4 + 6 + 8,
    ("llava_onevision", "one"): 4,
    ("llava_onevision", "ragged"): 4 + 4 + 8,
    ("llava_onevision", "one-video"): 1,
    ("llava_onevision", "ragged-videos"): 3,
    ("video_llava", "one-video"): 4,
    ("video_llava", "ragged-videos"): 12,
}


@of_every_case
@pytest.mark.parametrize("spec", ["fastervlm:5(score=received)", "visionzip:6(score=received)"])
def test_tower_out_reaches_the_right_slots(family, kind, spec):
    """What enters the LLM: each token that was not merged has the features of its own slot; merged ones, where that is
    after the projector, the weighted sum that the map says."""
    one = built(family)
    inputs = one.inputs(PROMPT_SETS[kind])
    adapter = adapter_for(one.model)
    encoder = adapter.encoders["video" in kind]
    method = getattr(adapter.inner, encoder.method)
    arguments = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    entered = []
    hook = adapter.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        one.model(**inputs)
        with vtc.compress(one.model, spec, positions="original") as handle:
            cache = names.cache_of(one.model(**inputs, use_cache=True))
            encoded = getattr(adapter.inner, encoder.method)(**arguments, return_dict=True)._vtc
    hook.remove()
    dense, short = entered
    weights = encoded.token_map.matrix()
    column = cache._vtc.layers[0].column
    start = [0] * len(column)
    for image, sample in enumerate(handle.report.samples):
        slots = (inputs["input_ids"][sample] == encoder.placeholder_id).nonzero()[:, 0]
        slots = slots[start[sample] : start[sample] + encoded.lengths[image]]
        start[sample] += len(slots)
        expected = weights[image, :, : len(slots)] @ dense[sample, slots]
        for slot in range(encoded.token_map.lengths[image]):
            (at,) = (column[sample] == slots[encoded.token_map.anchor[image, slot]]).nonzero()[:, 0]
            is_merged = (weights[image, slot] > 0).sum() > 1
            if not is_merged or encoder.features is None:
                torch.testing.assert_close(short[sample, at], expected[slot], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[1].startswith("ragged")])
def test_the_tower_budget_counts_tokens_and_not_separators(family, kind):
    one = built(family)
    inputs = one.inputs(PROMPT_SETS[kind])
    _, report = prefill(one.model, inputs, "fastervlm:5(score=received)")
    kept = report.token_map.anchor
    on_grid = report.layout.take(kept).segment >= 0
    counts = on_grid.sum(1).tolist()
    if family == "video_llava" and "video" in kind:  # [CLS] of a frame is one of its tokens
        assert report.token_map.lengths == (5,) * len(counts)
    else:
        assert counts == [5] * len(counts)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_stay_with_their_rows(family):
    one = built(family)
    _, report = prefill(one.model, one.inputs(PROMPTS), "fastervlm:3(score=received)")
    for image, grids in enumerate(report.layout.grids):
        row, segment = report.layout.row[image], report.layout.segment[image]
        kept = set(report.token_map.anchor[image, : report.token_map.lengths[image]].tolist())
        base = grids[0][0] * grids[0][1]
        line: list[int] = []
        for slot in range(base, len(row)):
            if segment[slot] >= 0:
                line.append(slot)
            elif line:
                assert (slot in kept) == bool(kept & set(line))
                line = []


def test_places_on_the_image_are_not_closed_up():
    one = built("qwen2_vl")
    with vtc.compress(one.model, "fastervlm:4(score=received)") as handle:
        assert handle.positions == "original"
    with pytest.raises(errors.UnsupportedFeatureError, match="M-RoPE"):
        vtc.patch(one.model, "fastervlm:4(score=received)", positions="compact")


def test_deepstack_layers_are_named():
    one = built("qwen3_vl")
    with pytest.raises(errors.SpecError, match=r"DeepStack.*first layer where this stage can act is 2"):
        vtc.patch(one.model, "fastv@1:4")


def test_sliding_windows_refuse_long_prompts():
    one = built("gemma3")
    inputs = one.inputs([(80, "image", 60)])
    with vtc.compress(one.model, "random:4"), pytest.raises(errors.UnsupportedFeatureError, match="more than the 128"):
        one.model(**inputs)


class TestImagesAndVideosInOnePrompt:
    PROMPTS = ((2, "video", 3, "image", 1, "image", 2), ("image", 2), (3, "video", 2), (4,))

    @pytest.mark.parametrize("attention", ATTENTION)
    @pytest.mark.parametrize(
        "spec", ["random:5", "fastervlm:7(score=received) + fastv@3:4", "fastervlm:9(score=received) + dart@3:5"]
    )
    @pytest.mark.parametrize("family", VIDEO)
    def test_logits_equal_the_masked_model(self, family, spec, attention):
        one = built(family, attention)
        report = equals_masked(one.model, one.inputs(self.PROMPTS), spec)
        assert report.entering[3] == report.after_last_cut[3] == 0
        if spec == "random:5":
            assert report.samples == (0, 0, 0, 1, 2)
            assert report.entering == (15, 5, 5, 0)

    @pytest.mark.parametrize("family", VIDEO)
    def test_groups_follow_the_prompt(self, family):
        """Image or video, each group has its own layout, in the order in which the prompt names them."""
        one = built(family)
        inputs = one.inputs(self.PROMPTS)
        separate = {}
        for kind, prompts in (("image", (("image", "image"), ("image",))), ("video", (("video",), ("video",)))):
            _, report = prefill(one.model, one.inputs(prompts), "random:5")
            separate[kind] = list(report.layout.grids)
        _, report = prefill(one.model, inputs, "random:5")
        images, videos = iter(separate["image"]), iter(separate["video"])
        order = (videos, images, images, images, videos)
        assert report.layout.grids == tuple(next(kind) for kind in order)
        assert report.token_map.lengths == (5,) * 5
        named = [(medium.modality, medium.number, medium.sample) for medium in report.media]
        assert named == [("video", 0, 0), ("image", 0, 0), ("image", 1, 0), ("image", 2, 1), ("video", 1, 2)]
        tokens = [sum(medium.tokens for medium in report.media if medium.sample == row) for row in range(4)]
        assert tuple(tokens) == report.visual_tokens
        _, pooled = prefill(one.model, inputs, "fastv@3:5")  # all tokens of a sample compete
        assert pooled.after_last_cut == (15, 5, 5, 0)
        assert pooled.media == report.media

    @pytest.mark.parametrize("family", VIDEO)
    def test_beams_repeat_images(self, family):
        one = built(family)
        with vtc.compress(one.model, "random:5") as handle, torch.no_grad():
            one.model.generate(**one.inputs((("image", "image"), ("image",))), max_new_tokens=1, num_beams=2)
        named = [(medium.number, medium.sample) for medium in handle.report.media]
        assert named == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (2, 3)]

    @pytest.mark.parametrize("attention", ATTENTION)
    @pytest.mark.parametrize("family", VIDEO)
    def test_a_covering_budget_changes_no_bit(self, family, attention):
        one = built(family, attention)
        inputs = one.inputs(self.PROMPTS)
        with torch.no_grad():
            expected = one.model(**inputs).logits
            with vtc.compress(one.model, "random:999 + fastervlm:999(score=received)", positions="original"):
                assert torch.equal(one.model(**inputs).logits, expected)

    @pytest.mark.parametrize("spec", ["pool:9", "visionzip:6(score=received)", "visionzip:9(score=received) + pool:4"])
    @pytest.mark.parametrize("family", VIDEO)
    def test_merged_tokens_reach_their_own_slots(self, family, spec):
        """Where tokens are merged behind the projector, what enters the LLM is the map times the dense input."""
        one = built(family)
        adapter = adapter_for(one.model)
        if "visionzip" in spec and any(encoder.features is not None for encoder in adapter.encoders):
            spec = "pool:9"
        inputs = one.inputs(self.PROMPTS)
        entered = []
        hook = adapter.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        with torch.no_grad():
            one.model(**inputs)
        output, report = prefill(one.model, inputs, spec)
        hook.remove()
        dense, short = entered
        column, weights = names.cache_of(output)._vtc.layers[0].column, report.token_map.matrix()
        merged = 0
        for group, (sample, slots) in enumerate(self.slots(one, inputs["input_ids"])):
            assert report.samples[group] == sample
            expected = weights[group, :, : len(slots)] @ dense[sample, slots]
            for slot in range(report.token_map.lengths[group]):
                (at,) = (column[sample] == slots[report.token_map.anchor[group, slot]]).nonzero()[:, 0]
                torch.testing.assert_close(short[sample, at], expected[slot], rtol=1e-4, atol=1e-5)
                merged += int((weights[group, slot] > 0).sum() > 1)
        assert merged >= 5

    def slots(self, one, ids):
        """The sample and the places in the prompt of each image and video, in prompt order."""
        seen = {"image": 0, "video": 0}
        for sample, prompt in enumerate(self.PROMPTS):
            start = {"image": 0, "video": 0}
            for kind in (piece for piece in prompt if isinstance(piece, str)):
                placeholder = one.placeholder if kind == "image" else one.video_placeholder
                count = one.piece(kind, seen[kind]).count(placeholder)
                places = (ids[sample] == placeholder).nonzero()[:, 0]
                yield sample, places[start[kind] : start[kind] + count]
                seen[kind] += 1
                start[kind] += count

    def test_a_modality_without_pixels(self):
        one = built("llava_onevision")
        inputs = one.inputs(self.PROMPTS)
        del inputs["pixel_values_videos"]
        with vtc.compress(one.model, "random:4"), pytest.raises(errors.InputError, match="video placeholders, but no"):
            one.model(**inputs)


def equals_masked(model, inputs, spec):
    output, report = prefill(model, inputs, spec)
    visible = visible_columns(names.cache_of(output), inputs["input_ids"].shape[1])
    kept = visible(3) & inputs["attention_mask"].bool()
    expected = masked_logits(model, inputs, visible)
    assert relative_difference(output.logits[kept], expected[kept]) < 1e-5
    return report


@pytest.mark.parametrize("size", [(28, 28), (10, 100), (100, 10), (3, 50), (50, 60), (28, 57)], ids=str)
def test_any_image_size_of_llava_next(size):
    """Also where whole tiles are padding and never reach the LLM."""
    one = tiny("llava_next")
    one.model.config.image_grid_pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28], [56, 112]]
    adapter = adapter_for(one.model)
    sizes = {"image_sizes": torch.tensor([size])}
    packing = adapter.packing(adapter.encoders[0], sizes)
    ids = torch.tensor([[7] * 3 + [one.placeholder] * packing.lengths[0] + [9] * 3])
    pixels = torch.randn(1, len(packing.slot), 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {**sizes, "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    report = equals_masked(one.model, inputs, "fastervlm:9(score=received)")
    assert int((report.layout.take(report.token_map.anchor).segment >= 0).sum()) == 9


def test_several_untiled_images_of_onevision():
    one = built("llava_onevision")
    ids = torch.tensor([[7] * 3 + [one.placeholder] * 17 + [8] * 2 + [one.placeholder] * 17 + [9] * 3])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 5, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[28, 56], [40, 56]]),
        "batch_num_images": torch.tensor([2]),
    }
    report = equals_masked(one.model, inputs, "fastervlm:5(score=received)")
    assert report.entering == (2 * (5 + 1),)
    assert report.layout.grids == (((4, 4),),) * 2


def test_paligemma_2():
    """Gemma 2 as decoder: alternating sliding windows, capped attention logits."""
    from transformers import Gemma2Config, PaliGemmaForConditionalGeneration

    one = built("paligemma", "eager")
    config = copy.deepcopy(one.model.config)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config.text_config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, vocab_size=200, sliding_window=64
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PaliGemmaForConditionalGeneration(config).eval()
    equals_masked(model, one.inputs(PROMPTS), "random:5 + dart@3:4")
    with pytest.raises(errors.SignalUnavailableError, match="caps attention logits"):
        vtc.patch(model, "fastv@2:4")


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_mean_attention_of_bidirectional_prompts(family):
    with pytest.raises(errors.SignalUnavailableError, match="partly bidirectional"):
        vtc.patch(built(family).model, "fastv@2:4(query=mean)")


@pytest.mark.parametrize("family", families())
def test_signals_that_do_not_exist(family):
    one = built(family)
    adapter = adapter_for(one.model)
    has_cls = any(encoder.num_prefix for encoder in adapter.encoders)
    assert (adapter.unavailable("cls_attention", "tower_out") is None) == has_cls
    if not has_cls:
        with pytest.raises(errors.SignalUnavailableError, match=r"no \[CLS\]"):
            vtc.patch(one.model, "fastervlm:4")
    assert adapter.unavailable("received_attention", "tower_out") is None
    assert adapter.unavailable("query_attention", "layer") is None


def test_peft_wrappers_are_looked_through():
    one = built("llava")

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model
            self.config = model.config

        def get_base_model(self):
            return self.base_model

        def forward(self, **inputs):
            return self.base_model(**inputs)

    inputs = one.inputs()
    with vtc.compress(Wrapper(one.model), "random:6") as handle, torch.no_grad():
        one.model(**inputs)
        assert handle.report.entering == (6,)
        with pytest.raises(errors.StateError, match="already patched"):
            vtc.patch(one.model, "random:6")


def test_inner_models_and_parts():
    one = built("llava")
    assert adapter_for(one.model.model).layers is adapter_for(one.model).layers
    with pytest.raises(errors.UnsupportedModelError, match="part of a 'qwen2_vl' model"):
        adapter_for(built("qwen2_vl").model.model.language_model)


@pytest.mark.parametrize("family", ["llava_next", "video_llava", "llava_onevision"])
def test_other_towers_are_refused(family):
    one = tiny(family)
    tower = "image_tower" if family == "video_llava" else "vision_tower"
    setattr(one.model.model, tower, torch.nn.Linear(2, 2))
    with pytest.raises(errors.UnsupportedModelError, match="neither CLIP- nor SigLIP-shaped"):
        vtc.patch(one.model, "random:6")


class TestSignalsFollowTheHost:
    """A signal is pooled to the LLM's tokens by the rule by which the host makes them."""

    def test_windows_of_qwen2_5(self):
        one = built("qwen2_5_vl")
        inputs, adapter = one.inputs(PROMPTS), adapter_for(one.model)
        with torch.no_grad():
            output = one.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            merged = adapter.inner.visual.merger(output.last_hidden_state)
        order = adapter.merged_order({"image_grid_thw": inputs["image_grid_thw"]}, torch.device("cpu"))
        assert not torch.equal(order, torch.arange(len(order)))
        torch.testing.assert_close(merged[order], torch.cat(output.pooler_output))

    def test_pixel_shuffle(self):
        patches = torch.randn(2, 64, 1)
        internvl, smolvlm = built("internvl"), built("smolvlm")
        expected = smolvlm.model.model.connector.pixel_shuffle(patches, 2).mean(-1, keepdim=True)
        shuffled = internvl.model.model.pixel_shuffle(patches.view(2, 8, 8, 1)).flatten(1, 2).mean(-1, keepdim=True)
        for one, result in ((internvl, shuffled), (smolvlm, expected)):
            (encoder,) = adapter_for(one.model).encoders
            torch.testing.assert_close(encoder.pool(patches, {}), result)

    def test_average_of_gemma3(self):
        patches = torch.randn(2, 64, 3)
        one = built("gemma3")
        pool = one.model.model.multi_modal_projector.avg_pool
        expected = pool(patches.transpose(1, 2).reshape(2, 3, 8, 8)).flatten(2).transpose(1, 2)
        (encoder,) = adapter_for(one.model).encoders
        torch.testing.assert_close(encoder.pool(patches, {}), expected)

    @pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "video_llava"])
    def test_received_attention_of_eager_towers(self, family):
        """Against the attention that the eager tower itself returns."""
        one = built(family, "eager")
        inputs, found = one.inputs(), {}

        class Probe(FasterVLM):
            def filter(self, tokens):
                found["received"] = tokens.signal("received_attention")
                return super().filter(tokens)

        probe = Probe(budget=Budget(tokens=5), score="received")
        (encoder, *_), attentions = adapter_for(one.model).encoders, []
        hook = encoder.signal_block.self_attn.register_forward_hook(lambda m, a, o: attentions.append(o[1]))
        with vtc.compress(one.model, probe), torch.no_grad():
            one.model(**inputs)
        hook.remove()
        skip = encoder.num_prefix if encoder.drops_prefix else 0
        torch.testing.assert_close(found["received"], attentions[0].mean(dim=(1, 2))[:, skip:])

    @pytest.mark.parametrize("kind", ["ragged", "ragged-videos"])
    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def test_received_attention_of_packed_towers(self, monkeypatch, family, kind):
        """Against the weights of the host's own eager attention, segment by segment."""
        one = built(family, "eager")
        encoder = adapter_for(one.model).encoders["video" in kind]
        host = importlib.import_module(type(encoder.tower).__module__)
        stock, segments, found = host.eager_attention_forward, [], {}

        def recording(module, *args, **kwargs):
            output, weights = stock(module, *args, **kwargs)
            if module is encoder.signal_block.attn:
                segments.append(weights.mean(dim=(1, 2)))
            return output, weights

        class Probe(FasterVLM):
            def filter(self, tokens):
                found["received"] = tokens.signal("received_attention")
                return super().filter(tokens)

        monkeypatch.setattr(host, "eager_attention_forward", recording)
        inputs = one.inputs(PROMPT_SETS[kind])
        with vtc.compress(one.model, Probe(budget=Budget(tokens=5), score="received")), torch.no_grad():
            one.model(**inputs)
        expected = encoder.pool(torch.cat(segments, dim=1)[..., None], inputs)[..., 0]
        torch.testing.assert_close(found["received"], expected)
