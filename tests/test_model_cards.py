"""Cards of the model families: one for each adapter, its numbers recomputed with the stock processors, its specs read.

Tables behind `<!-- tokens image -->` or `<!-- tokens video -->` are computed again from what transformers ships: image
processors of the family's class, sizes of the config's class defaults, and a tokenizer made here that knows the special
tokens. Nothing is downloaded.
"""

import functools
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import vtc
from vtc.adapter import adapter_classes, adapter_for
from vtc.engine.planning import make_plan
from vtc.errors import SpecError, VTCError
from vtc.testing.tiny import tiny

CARDS = Path(__file__).parents[1] / "model_cards"
FAMILIES = {cls.family: cls for cls in adapter_classes()}

#: family -> prefix of its classes in transformers
CLASSES = {
    "gemma3": "Gemma3",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
    "paligemma": "PaliGemma",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "smolvlm": "SmolVLM",
    "video_llava": "VideoLlava",
}

#: families whose tables have rows for the image size of the checkpoint, not for that of the picture
BY_RESOLUTION = ("paligemma",)


def card(family):
    return (CARDS / f"{family}.md").read_text()


# Counting with the stock processors


def tokenizer(family):
    names = {
        "image_token": "<image>",
        "video_token": "<video>",
        "boi_token": "<boi>",
        "eoi_token": "<eoi>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    words = ["<pad>", "<unk>", "\n\n", *names.values()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=names
    )


@functools.cache
def config(family):
    return getattr(transformers, CLASSES[family] + "Config")()


@functools.cache
def processor(family, side=None):
    """The stock processor, with sizes from the defaults of the config's class (`side`: another image size)."""
    vision = config(family).vision_config
    words = tokenizer(family)
    edge = side or vision.image_size if hasattr(vision, "image_size") else None
    square = {"height": edge, "width": edge}
    cls = getattr(transformers, CLASSES[family] + "Processor")
    if family == "llava":
        pixels = transformers.LlavaImageProcessor(crop_size=square, size={"shortest_edge": edge})
        return cls(
            pixels,
            words,
            vision.patch_size,
            config(family).vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
    if family in ("llava_next", "llava_next_video"):
        pixels = transformers.LlavaNextImageProcessor(
            crop_size=square, size={"shortest_edge": edge}, image_grid_pinpoints=config(family).image_grid_pinpoints
        )
        parts = {"image_processor": pixels, "tokenizer": words, "patch_size": vision.patch_size}
        if family == "llava_next_video":
            parts["video_processor"] = transformers.LlavaNextVideoVideoProcessor()
        strategy = config(family).vision_feature_select_strategy
        return cls(**parts, vision_feature_select_strategy=strategy, num_additional_image_tokens=1)
    if family == "llava_onevision":
        pixels = transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=config(family).image_grid_pinpoints
        )
        tokens = (edge // vision.patch_size) ** 2
        videos = transformers.LlavaOnevisionVideoProcessor()
        strategy = config(family).vision_feature_select_strategy
        return cls(pixels, words, videos, tokens, strategy, vision_aspect_ratio=config(family).vision_aspect_ratio)
    if family == "video_llava":
        pixels, videos = transformers.VideoLlavaImageProcessor(), transformers.VideoLlavaVideoProcessor()
        return cls(pixels, videos, words, vision.patch_size, config(family).vision_feature_select_strategy)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        pixels = transformers.Qwen2VLImageProcessor(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
        video_class = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
        return cls(pixels, words, getattr(transformers, video_class)())
    if family == "internvl":
        height, width = vision.image_size
        pixels = transformers.GotOcr2ImageProcessor(size={"height": height, "width": width})
        return cls(pixels, words, transformers.InternVLVideoProcessor(), config(family).image_seq_length)
    if family == "idefics3":
        return cls(transformers.Idefics3ImageProcessor(), words)
    if family == "gemma3":
        return cls(transformers.Gemma3ImageProcessor(), words, image_seq_length=config(family).mm_tokens_per_image)
    assert family == "paligemma"
    pixels = transformers.SiglipImageProcessor(size=square)
    pixels.image_seq_length = (edge // vision.patch_size) ** 2  # from the checkpoint's own file in real life
    return cls(pixels, words)


def image_counts(family, height, width):
    """Column of a card's table -> number for an image of this size."""
    if family == "smolvlm":  # its processor needs the package num2words, so its own functions are called without it
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        tiles, rows, cols = transformers.SmolVLMImageProcessor().get_number_of_image_patches(height, width)
        length = inspect.signature(transformers.SmolVLMProcessor).parameters["image_seq_len"].default
        text = get_image_prompt_string(rows, cols, length, "<fake>", "<image>", "<global>")
        return {"tiles": tiles, "visual tokens": text.count("<image>")}
    if family == "video_llava":  # its processor counts on pixels alone
        stock = processor(family)
        pixels = stock.image_processor(
            np.zeros((height, width, 3), dtype=np.uint8), return_tensors="np", return_legacy_image_output=False
        )
        return {"visual tokens": stock.replace_image_token(pixels, 0).count(stock.image_token)}
    if family in BY_RESOLUTION:
        assert height == width
        found = processor(family, height)._get_num_multimodal_tokens(image_sizes=[(480, 640)])
        return {"visual tokens": found["num_image_tokens"][0]}
    stock = processor(family)
    found = stock._get_num_multimodal_tokens(image_sizes=[(height, width)])
    tokens, tiles = found["num_image_tokens"][0], found["num_image_patches"][0]
    if family == "internvl":
        return {"tiles": tiles, "visual tokens": tiles * stock.image_seq_length, "with wrapping": tokens}
    if family == "idefics3":
        return {"tiles": tiles, "visual tokens": tiles * stock.image_seq_len, "with wrapping": tokens}
    if family.startswith("llava_"):
        return {"visual tokens": tokens, "of which newlines": newlines(stock, height, width)}
    return {"visual tokens": tokens}


def newlines(stock, height, width):
    """Newlines among the tokens that the stock processor counts, by its own rule."""
    asked = []
    rule = stock._get_unpadded_features
    stock._get_unpadded_features = lambda *sizes: asked.append(rule(*sizes)) or asked[-1]
    try:
        stock._get_num_multimodal_tokens(image_sizes=[(height, width)])
    finally:
        del stock._get_unpadded_features
    return asked[0][1]


def video_counts(family, frames, height, width):
    """Column of a card's table -> number for a video of this size."""
    stock = processor(family)
    if family in ("video_llava", "llava_next_video"):
        edge = config(family).vision_config.image_size
        pixels = {"pixel_values_videos": np.zeros((1, frames, 3, edge, edge), dtype=np.float32)}
        return {"visual tokens": stock.replace_video_token(pixels, 0).count(stock.video_token)}
    if family == "qwen2_5_vl":
        family = "qwen2_vl"  # the same classes and sizes
    found = stock._get_num_multimodal_tokens(video_sizes=[(frames, height, width)])
    return {"visual tokens": found["num_video_tokens"][0]}


# What the cards say


def tables(text, kind):
    """Rows of the marked tables as dicts of cells."""
    found = re.findall(rf"^<!-- tokens {kind} -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = []
    for table in found:
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()]
        head, body = lines[0], lines[2:]
        assert all(len(line) == len(head) for line in body)
        rows += [dict(zip(head, line, strict=True)) for line in body]
    return rows


def specs(text):
    """(spec, whether the card says that it runs) of the table of methods and of the examples."""
    rows = [
        (found[1], found[2].strip() == "yes")
        for found in re.finditer(r"^\|.*\| `([^`]+)` \| ([^|]+) \|$", text, re.MULTILINE)
    ]
    examples = [(found, True) for found in re.findall(r'vtc\.(?:patch|compress)\(model, "([^"]+)"', text)]
    return rows, examples


def test_every_family_has_a_card():
    cards = {path.stem for path in CARDS.glob("*.md")} - {"README"}
    assert cards == set(FAMILIES)
    assert set(CLASSES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_checkpoints(family):
    text, adapter = card(family), FAMILIES[family]
    model = getattr(transformers, CLASSES[family] + "ForConditionalGeneration")
    assert f"`{model.__name__}`" in text
    assert model.config_class.model_type in adapter.model_types
    for name in (*adapter.model_types, *adapter.checkpoints):
        assert f"`{name}`" in text
    loaded = re.findall(r'from_pretrained\("([^"]+)"', text)
    assert loaded
    assert set(loaded) <= set(adapter.checkpoints)
    assert set(re.findall(r"vtc doctor ([^\s`]+/[^\s`]+)", text)) <= set(adapter.checkpoints)
    assert "vtc doctor" in text
    assert "No checkpoint was loaded" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_images(family):
    rows = tables(card(family), "image")
    assert len(rows) >= 3
    for row in rows:
        size = row.pop("image (h x w)", None) or row.pop("checkpoint resolution")
        height, width = (int(part) for part in size.split(" x "))
        assert row == {name: str(count) for name, count in image_counts(family, height, width).items()}, size


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_videos(family):
    rows = tables(card(family), "video")
    has_video = any(encoder.modality == "video" for encoder in adapter_for(tiny(family, layers=1).model).encoders)
    assert bool(rows) == has_video
    for row in rows:
        size = row.pop("video (frames x h x w)")
        frames, height, width = (int(part) for part in size.split(" x "))
        assert row == {name: str(count) for name, count in video_counts(family, frames, height, width).items()}, size


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_parse_and_run_where_the_card_says_so(family):
    rows, examples = specs(card(family))
    assert rows
    assert examples
    adapter = adapter_for(tiny(family, layers=5).model)
    for spec, runs in (*rows, *examples):
        methods = vtc.parse(spec)
        assert all(method.slug in vtc.methods() for method in methods)
        if runs:
            make_plan(adapter, methods, "auto", size_bias=False)
        else:  # a row that says otherwise is refused as it stands
            with pytest.raises(VTCError):
                make_plan(adapter, methods, "auto", size_bias=False)


def test_a_wrong_card_is_noticed():
    text = "<!-- tokens image -->\n| image (h x w) | visual tokens |\n|---|---|\n| 336 x 336 | 575 |\n"
    (row,) = tables(text, "image")
    assert row["visual tokens"] != str(image_counts("llava", 336, 336)["visual tokens"])
    rows, _ = specs("| VisionZip | 64 | a card | `visionzipp:64` | yes |\n")
    with pytest.raises(SpecError):
        vtc.parse(rows[0][0])
