"""CDPruner's joint space: a CLIP model beside the vision-language model."""

import functools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

import vtc
from vtc import errors
from vtc.engine.host import names
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.tiny import PROMPTS

CONTEXT = 8


@functools.cache
def words(marks=False):
    """One word for each id: `<7>` is 7."""
    names = [f"<{i}>" for i in range(200)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<1>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if marks:
        backend.post_processor = processors.TemplateProcessing(
            single="<197> $A <198>", special_tokens=[("<197>", 197), ("<198>", 198)]
        )
    special = {"additional_special_tokens": ["<199>"]} if not marks else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<1>", pad_token="<0>", **special)


@functools.cache
def clip(width=32):
    tower = dict(hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **tower, vocab_size=200, max_position_embeddings=CONTEXT, bos_token_id=197, eos_token_id=198
        ).to_dict(),
        vision_config=CLIPVisionConfig(**tower, image_size=28, patch_size=7).to_dict(),
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@functools.cache
def built(family):
    return tiny(family)


def companion(**options):
    return vtc.ClipCompanion(clip(), words(marks=True), words(), **options)


class Seen:
    """The tokens that CDPruner was given."""

    def __init__(self, monkeypatch):
        self.tokens = []
        cls = vtc.catalogue.registry.method_class("cdpruner")
        stock = cls.filter
        monkeypatch.setattr(
            cls, "filter", lambda method, tokens: (self.tokens.append(tokens), stock(method, tokens))[1]
        )


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family", ["llava", "video_llava"])
def test_embeddings_are_those_of_clip(monkeypatch, family, prompts):
    one, seen = built(family), Seen(monkeypatch)
    inputs = one.inputs(prompts)
    with vtc.compress(one.model, "cdpruner:5", companion=companion()), torch.no_grad():
        one.model(**inputs)
    (tokens,) = seen.tokens
    tower, model = getattr(one.model.model, "vision_tower", None) or one.model.model.image_tower, clip()
    with torch.no_grad():
        pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(tokens.signal("clip_image_embeds"), expected, rtol=1e-4, atol=1e-5)
    samples = [b for b, prompt in enumerate(prompts) for piece in prompt if piece == "image"]
    for g, b in enumerate(samples):
        ids = inputs["input_ids"][b]
        behind = ids[int((ids == one.placeholder).nonzero().max()) + 1 :]
        text = torch.tensor([[197, *behind.tolist(), 198]])
        assert text.shape[1] <= CONTEXT
        with torch.no_grad():
            pooled = model.get_text_features(input_ids=text)
        pooled = getattr(pooled, "pooler_output", pooled)
        torch.testing.assert_close(tokens.signal("clip_text_embeds")[g], pooled, rtol=1e-4, atol=1e-5)


def test_long_questions_are_cut_into_pieces():
    ids = [list(range(10, 10 + n)) for n in (3, 11, 20)]
    embeds = companion().text_embeds(ids, torch.device("cpu"))
    assert embeds.shape == (3, 3, 24)
    assert (embeds != 0).any(-1).sum(1).tolist() == [1, 2, 3]
    model = clip()
    for row, tokens in zip(embeds, ids, strict=True):
        whole = [197, *tokens, 198]
        for piece in range(0, len(whole), CONTEXT):
            part = torch.tensor([whole[piece : piece + CONTEXT]])
            part = torch.nn.functional.pad(part, (0, CONTEXT - part.shape[1]))
            with torch.no_grad():
                pooled = model.text_projection(model.text_model(input_ids=part).pooler_output)
            torch.testing.assert_close(row[piece // CONTEXT], pooled[0], rtol=1e-4, atol=1e-5)


def test_the_question_can_be_chosen(monkeypatch):
    one, seen, read = built("llava"), Seen(monkeypatch), []
    inputs = one.inputs([(6, "image"), (2, "image", 3)])  # nothing stands behind the first image
    question = lambda text: (read.append(text), "<9> <8>")[1]  # noqa: E731
    with vtc.compress(one.model, "cdpruner:5", companion=companion(question=question)), torch.no_grad():
        one.model(**inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for b, text in enumerate(read):
        row = ids[b][mask[b] & (ids[b] != one.placeholder)].tolist()
        row = row if b == 0 else row[-3:]
        assert text.split() == [f"<{i}>" for i in row]
    text = seen.tokens[0].signal("clip_text_embeds")
    torch.testing.assert_close(text[0], text[1])


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video", "video_llava"])
def test_cdpruner_is_exact(family):
    one = built(family)
    inputs = one.inputs(PROMPTS)
    with vtc.compress(one.model, "cdpruner:0.4", positions="original", companion=companion()), torch.no_grad():
        out = one.model(**inputs, use_cache=True)
    visible = visible_columns(names.cache_of(out), inputs["input_ids"].shape[1])
    expected = masked_logits(one.model, inputs, visible)
    kept = visible(0) & inputs["attention_mask"].bool()
    assert int((visible(0) & (inputs["input_ids"] == one.placeholder)).sum()) > 0
    assert relative_difference(out.logits[kept], expected[kept]) < 1e-5


def test_separators_are_never_more_relevant_than_patches():
    """A newline has no place in CLIP's space."""
    image = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0))
    image[0, 3] = 0.0
    tokens = vtc.Tokens.of(torch.randn(1, 8, 4), 3, clip_image_embeds=image, clip_text_embeds=torch.randn(1, 1, 6))
    quality = vtc.create("cdpruner").quality(tokens)[0]
    assert int(quality.argmin()) == 3


@pytest.mark.parametrize("family", families())
def test_without_a_companion_the_reason_is_named(family):
    has_clip = family in ("llava", "llava_next", "llava_next_video", "video_llava")
    message = "companion=vtc.ClipCompanion" if has_clip else "no CLIP tower"
    with pytest.raises(errors.SignalUnavailableError, match=message):
        vtc.patch(built(family).model, "cdpruner:5")


def test_a_companion_that_does_not_fit():
    one = built("llava")
    wide = vtc.ClipCompanion(clip(64), words(marks=True), words())
    with pytest.raises(errors.SignalUnavailableError, match="64 wide and the model's 32"):
        vtc.patch(one.model, "cdpruner:5", companion=wide)
    with pytest.raises(errors.UnsupportedModelError, match=r"lacks .*text_model"):
        vtc.ClipCompanion(clip().vision_model, words(), words())
    with pytest.raises(errors.UnsupportedModelError, match="has no decode"):
        vtc.ClipCompanion(clip(), words(), object())
    with pytest.raises(errors.SignalUnavailableError, match="no CLIP tower"):
        vtc.patch(built("llava_onevision").model, "cdpruner:5", companion=companion())


def test_generate_and_beams_with_a_companion():
    one = built("llava")
    inputs = one.inputs(PROMPTS[:2])
    with vtc.compress(one.model, "cdpruner:5", companion=companion()) as handle:
        one.model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert handle.report.entering[0] == 5
