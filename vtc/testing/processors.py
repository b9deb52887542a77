"""Stock processors for the tiny models, built without any download: from a picture and a question to model inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtc.testing.tiny import ANYRES_PINPOINTS, PATCH, TILE, TinyModel, tiny

#: a tile of the families whose tokens stand for blocks of patches
SMALL = 24

#: placeholder of an image in a prompt, before the processor repeats it; the others write <image>
IMAGE_MARKS = {
    "gemma3": "<boi>",
    "qwen2_vl": "<start><image><end>",
    "qwen2_5_vl": "<start><image><end>",
    "qwen3_vl": "<start><image><end>",
}

#: ids of tokens that mean something, as the configs of the tiny models name them
_NAMED = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<start>": 196, "<end>": 197, "<video>": 198, "<image>": 199}

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def save_checkpoint(family: str, folder: Path) -> TinyModel:
    """A tiny model of `family` and its stock processor, written to `folder` as a checkpoint is."""
    one = tiny(family)
    one.model.save_pretrained(folder)
    processor_for(one).save_pretrained(folder)
    return one


def processor_for(one: TinyModel) -> Any:
    """The stock processor of the family of `one`, with a word-level tokenizer and the sizes of the tiny model."""
    import transformers

    family = one.family
    parts: dict[str, Any] = {"tokenizer": _tokenizer(), "image_processor": _image_processor(family)}
    settings = dict(_SETTINGS.get(family, {}))
    video = settings.pop("video", None)
    if video is not None:
        parts["video_processor"] = getattr(transformers, video[0])(**video[1])
    template = _TEMPLATE.replace("MARK", IMAGE_MARKS.get(family, "<image>"))
    name = type(one.model).__name__.replace("ForConditionalGeneration", "Processor")
    return getattr(transformers, name)(**parts, **settings, chat_template=template)


def _image_processor(family: str) -> Any:
    import transformers

    name, settings = _IMAGES[family]
    processor = getattr(transformers, name)(**settings)
    if family == "paligemma":
        processor.image_seq_length = (TILE // PATCH) ** 2
    return processor


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<boi>", "<eoi>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    marks += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    vocabulary = {**_NAMED, **{mark: 150 + i for i, mark in enumerate(marks)}}
    used = set(vocabulary.values())
    vocabulary |= {f"word{i}": i for i in range(200) if i not in used}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*_NAMED, *marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "context_image_token": "<image>",
            "video_token": "<video>",
            "start_image_token": "<start>",
            "end_image_token": "<end>",
            "vision_start_token": "<start>",
            "vision_end_token": "<end>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
        },
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_CROPPED = {"size": {"shortest_edge": TILE}, "crop_size": _square(TILE)}
_ANYRES = {**_CROPPED, "image_grid_pinpoints": ANYRES_PINPOINTS}
_NATIVE = {
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": 60 * (2 * PATCH) ** 2},
}
_SPLIT = {"size": {"longest_edge": 3 * SMALL}, "max_image_size": {"longest_edge": SMALL}}

#: class of the image processor and its settings
_IMAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ImageProcessor", {"size": _square(SMALL)}),
    "idefics3": ("Idefics3ImageProcessor", _SPLIT),
    "internvl": ("GotOcr2ImageProcessor", {"size": _square(SMALL), "max_patches": 6}),
    "llava": ("CLIPImageProcessor", _CROPPED),
    "llava_next": ("LlavaNextImageProcessor", _ANYRES),
    "llava_next_video": ("LlavaNextImageProcessor", _ANYRES),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {"size": _square(TILE), "image_grid_pinpoints": ANYRES_PINPOINTS},
    ),
    "paligemma": ("SiglipImageProcessor", {"size": _square(TILE)}),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", _NATIVE),
    "qwen2_vl": ("Qwen2VLImageProcessor", _NATIVE),
    "qwen3_vl": ("Qwen2VLImageProcessor", _NATIVE),
    "smolvlm": ("SmolVLMImageProcessor", _SPLIT),
    "video_llava": ("VideoLlavaImageProcessor", _CROPPED),
}

_PATCHES: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}

#: what a processor is told beside its parts; "video": class and settings of its video processor
_SETTINGS: Mapping[str, dict[str, Any]] = {
    "gemma3": {"image_seq_length": 16},
    "idefics3": {"image_seq_len": 16},
    "internvl": {"image_seq_length": 16, "video": ("InternVLVideoProcessor", {"size": _square(SMALL)})},
    "llava": {**_PATCHES, "num_additional_image_tokens": 1},
    "llava_next": {**_PATCHES, "num_additional_image_tokens": 1},
    "llava_next_video": {
        **_PATCHES,
        "num_additional_image_tokens": 1,
        "video": ("LlavaNextVideoVideoProcessor", _CROPPED),
    },
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
        "video": ("LlavaOnevisionVideoProcessor", {"size": _square(TILE)}),
    },
    "qwen2_5_vl": {"video": ("Qwen2VLVideoProcessor", _NATIVE)},
    "qwen2_vl": {"video": ("Qwen2VLVideoProcessor", _NATIVE)},
    "qwen3_vl": {"video": ("Qwen3VLVideoProcessor", _NATIVE)},
    "smolvlm": {"image_seq_len": 16, "video": ("SmolVLMVideoProcessor", _SPLIT)},
    "video_llava": {**_PATCHES, "video": ("VideoLlavaVideoProcessor", _CROPPED)},
}
