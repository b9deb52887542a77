"""Random-weight models of every family, small enough for a test, built from stock configs without any download."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

#: a prompt as pieces: a number of text tokens, "image" or "video"
Prompt = Sequence[int | str]

#: three prompts that differ in length, place and number of images; the last has none
PROMPTS: tuple[Prompt, ...] = ((3, "image", 5), ("image", 4, "image", 2), (6,))

#: the same with videos
VIDEO_PROMPTS: tuple[Prompt, ...] = ((3, "video", 5), ("video", 4, "video", 2), (6,))

#: images and videos in one prompt, each in one alone, and none
MIXED_PROMPTS: tuple[Prompt, ...] = ((2, "video", 3, "image", 1, "image", 2), ("image", 2), (3, "video", 2), (4,))

TEXT = (5, 150)  # ids of text tokens; placeholders and separators lie above
PATCH = 7
#: options that every model config takes although its class does not name them
_PLAIN: dict[str, Any] = {"pad_token_id": 0}
TILE = 28  # 4 x 4 patches


@dataclass(frozen=True)
class TinyModel:
    """A tiny model and how to make prompts for it.

    Args:
        family: name of the family.
        model: the model.
        image_tokens: placeholders of an image, where all have the same number.
        placeholder: id of an image placeholder.
        image_size: height and width of an image or tile.
        has_video: whether prompts may hold "video".
    """

    family: str
    model: Any
    image_tokens: int
    placeholder: int
    image_size: int
    has_video: bool = False

    @property
    def special(self) -> list[int]:
        """Placeholders and their wrappers: ids that a trained model does not generate."""
        return [195, 196, 197, 198, 199]

    def inputs(
        self, prompts: Sequence[Prompt] = PROMPTS[:1], seed: int = 0, padding: str = "left"
    ) -> dict[str, Tensor]:
        """Model inputs for `prompts`, padded to the longest, with random text, images and videos."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = []
        kinds: list[list[str]] = []
        seen = {"image": 0, "video": 0}
        for prompt in prompts:
            row: list[int] = []
            for piece in prompt:
                if isinstance(piece, str):
                    row += self.piece(piece, seen[piece])
                    seen[piece] += 1
                else:
                    row += torch.randint(*TEXT, (piece,), generator=generator).tolist()
            rows.append(row)
            kinds.append([piece for piece in prompt if isinstance(piece, str)])
        width = max(len(row) for row in rows)
        ids, mask = [], []
        for row in rows:
            pad = [0] * (width - len(row))
            ids.append(pad + row if padding == "left" else row + pad)
            ones = [1] * len(row)
            mask.append(pad + ones if padding == "left" else ones + pad)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {**inputs, **self.types(inputs["input_ids"]), **self.pixels(kinds, generator)}

    def extend(self, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """`inputs` with the generated tokens `ids` [B, T] behind the prompts."""
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], dim=1)}
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        for name, value in self.types(ids, generated=True).items():
            longer[name] = torch.cat([inputs[name], value], dim=1)
        return longer

    def piece(self, kind: str, number: int) -> list[int]:
        """Ids of the `number`-th image or video."""
        return [self.placeholder] * self.image_tokens

    def types(self, ids: Tensor, generated: bool = False) -> dict[str, Tensor]:
        """Inputs that say what kind each token of `ids` has."""
        return {}

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        """Pixels of the images and videos of each prompt."""
        count = sum(len(row) for row in kinds)
        if not count:
            return {}
        return {"pixel_values": torch.randn(count, 3, self.image_size, self.image_size, generator=generator)}


def families() -> tuple[str, ...]:
    """Families that `tiny` can build, sorted."""
    return tuple(sorted(_BUILDERS))


def tiny(family: str = "llava", attention: str = "sdpa", seed: int = 0, layers: int = 4) -> TinyModel:
    """A random-weight model of `family` with `layers` decoder layers, in fp32 and eval mode.

    Weights are drawn from N(0, 0.3), large enough that attention is far from uniform and errors show.
    """
    # built under a fork of the generator, so that a test's own random numbers do not depend on it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = _BUILDERS[family](attention, layers)
        for name, parameter in built.model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    built.model.eval()
    return built


def _llama(layers: int, **other: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_decoder(layers), **other)


def _decoder(layers: int) -> dict[str, Any]:
    return dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


def _tower() -> dict[str, Any]:
    return dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
    )


def _built(cls: Any, config: Any, attention: str) -> Any:
    config._attn_implementation = attention
    model = cls(config)
    model.set_attn_implementation(attention)
    return model


def _llava(attention: str, layers: int) -> TinyModel:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower()), text_config=_llama(layers), image_token_index=199, **_PLAIN
    )
    model = _built(LlavaForConditionalGeneration, config, attention)
    return TinyModel("llava", model, image_tokens=16, placeholder=199, image_size=TILE)


#: image sizes that the AnyRes families cycle through: one row of tiles, an unpadded square of tiles, one column
ANYRES_SIZES = ((28, 56), (40, 56), (56, 28))
ANYRES_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


@dataclass(frozen=True)
class _AnyRes(TinyModel):
    lengths: tuple[int, ...] = ()
    video_placeholder: int = 198
    video_tokens: int = 0
    frames: int = 4

    def piece(self, kind: str, number: int) -> list[int]:
        if kind == "video":
            return [self.video_placeholder] * self.video_tokens
        return [self.placeholder] * self.lengths[number % len(self.lengths)]

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        images, videos = (sum(row.count(kind) for row in kinds) for kind in ("image", "video"))
        found = {}
        if images:
            sizes = [ANYRES_SIZES[i % len(ANYRES_SIZES)] for i in range(images)]
            shape = (images, 5, 3, self.image_size, self.image_size)
            found["pixel_values"] = torch.randn(*shape, generator=generator)
            found["image_sizes"] = torch.tensor(sizes)
        if videos:
            shape = (videos, self.frames, 3, self.image_size, self.image_size)
            found["pixel_values_videos"] = torch.randn(*shape, generator=generator)
        return found


def _llava_next(attention: str, layers: int) -> TinyModel:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower()),
        text_config=_llama(layers),
        image_token_index=199,
        image_grid_pinpoints=ANYRES_PINPOINTS,
        **_PLAIN,
    )
    model = _built(LlavaNextForConditionalGeneration, config, attention)
    # base tile, unpadded grid, one newline per row: 16 + 4 * 9, 16 + 6 * 9, 16 + 8 * 5
    return _AnyRes("llava_next", model, 0, placeholder=199, image_size=TILE, lengths=(52, 70, 56))


def _llava_next_video(attention: str, layers: int) -> TinyModel:
    from transformers import CLIPVisionConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**_tower()),
        text_config=_llama(layers),
        image_token_index=199,
        video_token_index=198,
        image_grid_pinpoints=ANYRES_PINPOINTS,
        **_PLAIN,
    )
    model = _built(LlavaNextVideoForConditionalGeneration, config, attention)
    lengths = (52, 70, 56)
    return _AnyRes("llava_next_video", model, 0, 199, TILE, has_video=True, lengths=lengths, video_tokens=16)


def _llava_onevision(attention: str, layers: int) -> TinyModel:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(), vision_use_head=False),
        text_config=Qwen2Config(**_decoder(layers)),
        image_token_index=199,
        video_token_index=198,
        image_grid_pinpoints=ANYRES_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        **_PLAIN,
    )
    model = _built(LlavaOnevisionForConditionalGeneration, config, attention)
    # 6 x 8 and 4 x 8 tokens beside the base tile; the first is more than 1.1^2 * 2 tiles and shrinks to 4 x 6
    lengths = (52, 16 + 4 * 7, 56)
    return _AnyRes("llava_onevision", model, 0, 199, TILE, has_video=True, lengths=lengths, video_tokens=17)


@dataclass(frozen=True)
class _Clips(TinyModel):
    video_placeholder: int = 198
    video_tokens: int = 0
    frames: int = 4
    pixels_name: str = "pixel_values"

    def piece(self, kind: str, number: int) -> list[int]:
        if kind == "video":
            return [self.video_placeholder] * self.video_tokens
        return [self.placeholder] * self.image_tokens

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        videos = sum(row.count("video") for row in kinds)
        images = super().pixels([[kind for kind in row if kind == "image"] for row in kinds], generator)
        found = {self.pixels_name: images["pixel_values"]} if images else {}
        if videos:
            shape = (videos, self.frames, 3, self.image_size, self.image_size)
            found["pixel_values_videos"] = torch.randn(*shape, generator=generator)
        return found


def _video_llava(attention: str, layers: int) -> TinyModel:
    from transformers import CLIPVisionConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_tower()),
        text_config=_llama(layers),
        image_token_index=199,
        video_token_index=198,
        **_PLAIN,
    )
    model = _built(VideoLlavaForConditionalGeneration, config, attention)
    # hosts before 5.22 name the pixels of images after their kind, and later ones warn of that name
    name = "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "pixel_values_images"
    return _Clips(
        "video_llava",
        model,
        16,
        199,
        TILE,
        has_video=True,
        video_tokens=4 * 17,
        pixels_name=name,
    )


@dataclass(frozen=True)
class _Tiled(TinyModel):
    """Images of 1, 2, 1, 2 ... tiles."""

    def tiles(self, number: int) -> int:
        return 1 + number % 2

    def piece(self, kind: str, number: int) -> list[int]:
        return [196, *[self.placeholder] * (self.image_tokens * self.tiles(number)), 197]

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        images = sum(len(row) for row in kinds)
        return super().pixels([["image"] * sum(self.tiles(i) for i in range(images))], generator)


def _internvl(attention: str, layers: int) -> TinyModel:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = {**_tower(), "image_size": (24, 24), "patch_size": (3, 3)}  # 8 x 8 patches, 4 x 4 tokens
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, use_qk_norm=True, layer_scale_init_value=1.0),
        text_config=Qwen2Config(**_decoder(layers)),
        image_token_id=199,
        image_seq_length=16,
        **_PLAIN,
    )
    model = _built(InternVLForConditionalGeneration, config, attention)
    return _Tiled("internvl", model, image_tokens=16, placeholder=199, image_size=24)


@dataclass(frozen=True)
class _Wrapped(_Tiled):
    """Tiles that stand between text tokens, in pixels padded to the prompt with the most tiles."""

    def piece(self, kind: str, number: int) -> list[int]:
        tile = [196, *[self.placeholder] * self.image_tokens, 197]
        return tile * self.tiles(number)

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        counts, seen = [], 0
        for row in kinds:
            counts.append(sum(self.tiles(seen + i) for i in range(len(row))))
            seen += len(row)
        if not seen:
            return {}
        pixels = torch.zeros(len(kinds), max(counts), 3, self.image_size, self.image_size)
        for prompt, count in zip(pixels, counts, strict=True):
            prompt[:count] = torch.randn(prompt[:count].shape, generator=generator)
        return {"pixel_values": pixels}


def _idefics(family: str) -> Callable[[str, int], TinyModel]:
    def build(attention: str, layers: int) -> TinyModel:
        import transformers

        name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        vision = {**_tower(), "image_size": 24, "patch_size": 3}
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision,
            text_config=_llama(layers),
            image_token_id=199,
            scale_factor=2,
            **_PLAIN,
        )
        model = _built(getattr(transformers, f"{name}ForConditionalGeneration"), config, attention)
        return _Wrapped(family, model, image_tokens=16, placeholder=199, image_size=24)

    return build


@dataclass(frozen=True)
class _Typed(TinyModel):
    """Bidirectional images: token types say which tokens are of an image (Gemma 3) or of the suffix (PaliGemma)."""

    suffix: int = 0

    def piece(self, kind: str, number: int) -> list[int]:
        return [196, *[self.placeholder] * self.image_tokens, 197]

    def types(self, ids: Tensor, generated: bool = False) -> dict[str, Tensor]:
        if generated:
            return {"token_type_ids": torch.full_like(ids, self.suffix)}
        return {"token_type_ids": torch.zeros_like(ids) if self.suffix else (ids == self.placeholder).long()}


def _siglip(**other: Any) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**{**_tower(), **other}, vision_use_head=False)


def _gemma3(attention: str, layers: int) -> TinyModel:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = Gemma3TextConfig(
        **_decoder(layers),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=128,
        layer_types=["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
    )
    config = Gemma3Config(
        vision_config=_siglip(image_size=24, patch_size=3),
        text_config=text,
        image_token_index=199,
        mm_tokens_per_image=16,
        **{**_PLAIN, "eos_token_id": None},
    )
    model = _built(Gemma3ForConditionalGeneration, config, attention)
    return _Typed("gemma3", model, image_tokens=16, placeholder=199, image_size=24)


def _paligemma(attention: str, layers: int) -> TinyModel:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=GemmaConfig(**_decoder(layers), head_dim=8),
        image_token_index=199,
        projection_dim=32,
        hidden_size=32,
        **{**_PLAIN, "eos_token_id": None},
    )
    model = _built(PaliGemmaForConditionalGeneration, config, attention)
    return _Typed("paligemma", model, image_tokens=16, placeholder=199, image_size=TILE, suffix=1)


@dataclass(frozen=True)
class _Qwen(TinyModel):
    grids: tuple[tuple[int, int, int], ...] = ((1, 6, 8), (1, 8, 4), (1, 10, 6))
    video_grid: tuple[int, int, int] = (3, 4, 4)
    video_placeholder: int = 198
    separate_frames: bool = False
    patch_width: int = 3 * 2 * PATCH * PATCH

    def piece(self, kind: str, number: int) -> list[int]:
        start, end, stamp = 196, 197, 195
        if kind == "image":
            t, h, w = self.grids[number % len(self.grids)]
            return [start, *[self.placeholder] * (t * h * w // 4), end]
        t, h, w = self.video_grid
        frame = [self.video_placeholder] * (h * w // 4)
        if self.separate_frames:
            return [i for _ in range(t) for i in (stamp, start, *frame, end)]
        return [start, *frame * t, end]

    def types(self, ids: Tensor, generated: bool = False) -> dict[str, Tensor]:
        is_image, is_video = ids == self.placeholder, ids == self.video_placeholder
        return {"mm_token_type_ids": torch.zeros_like(ids) if generated else is_image.long() + 2 * is_video.long()}

    def pixels(self, kinds: Sequence[Sequence[str]], generator: Generator) -> dict[str, Tensor]:
        images, videos = (sum(row.count(kind) for row in kinds) for kind in ("image", "video"))
        found = {}
        for name, pixels, count, grids in (
            ("image_grid_thw", "pixel_values", images, self.grids),
            ("video_grid_thw", "pixel_values_videos", videos, (self.video_grid,)),
        ):
            if count:
                chosen = torch.tensor([grids[i % len(grids)] for i in range(count)])
                found[name] = chosen
                found[pixels] = torch.randn(int(chosen.prod(1).sum()), self.patch_width, generator=generator)
        return found


def _qwen_tokens() -> dict[str, Any]:
    return dict(image_token_id=199, video_token_id=198, vision_start_token_id=196, vision_end_token_id=197)


def _qwen2_vl(attention: str, layers: int) -> TinyModel:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=PATCH)
    text = {**_decoder(layers), "rope_parameters": _mrope(2, 1, 1)}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, **_PLAIN, **_qwen_tokens())
    model = _built(Qwen2VLForConditionalGeneration, config, attention)
    return _Qwen("qwen2_vl", model, 0, placeholder=199, image_size=0, has_video=True)


def _qwen2_5_vl(attention: str, layers: int) -> TinyModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=PATCH,
        window_size=4 * PATCH,  # 2 x 2 tokens
        fullatt_block_indexes=[1],
    )
    text = {**_decoder(layers), "rope_parameters": _mrope(2, 1, 1)}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_PLAIN, **_qwen_tokens())
    model = _built(Qwen2_5_VLForConditionalGeneration, config, attention)
    return _Qwen("qwen2_5_vl", model, 0, placeholder=199, image_size=0, has_video=True)


def _qwen3_vl(attention: str, layers: int) -> TinyModel:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=PATCH,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1],
    )
    text = {**_decoder(layers), "head_dim": 8, "rope_parameters": {**_mrope(2, 1, 1), "mrope_interleaved": True}}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_PLAIN, **_qwen_tokens())
    model = _built(Qwen3VLForConditionalGeneration, config, attention)
    return _Qwen("qwen3_vl", model, 0, placeholder=199, image_size=0, has_video=True, separate_frames=True)


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


_BUILDERS: dict[str, Callable[[str, int], TinyModel]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics("idefics3"),
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _idefics("smolvlm"),
    "video_llava": _video_llava,
}
