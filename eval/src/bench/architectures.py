"""Architectures of well-known checkpoints with random weights, for timing where the weights are not at hand.

Time does not depend on what the weights are, except for methods whose token count depends on the content. The sizes are
those that the checkpoints' publishers state; token ids are our own, since no tokenizer is involved. On a CPU the same
architecture runs at a quarter of the width with four blocks in tower and decoder (`small`), with as many visual tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.errors import unknown_name

IMAGE, VIDEO, START, END = 10, 11, 12, 13
FIRST_WORD = 100
TEXT_TOKENS = 64  # around the image: a system prompt and a question
SMALL_WIDTH, SMALL_BLOCKS, SMALL_VOCABULARY = 4, 4, 4096


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model."""

    width: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    head: int = 128

    def small(self) -> "Decoder":
        """A quarter as wide, four layers."""
        heads = self.heads // SMALL_WIDTH
        return replace(
            self,
            width=self.width // SMALL_WIDTH,
            mlp=self.mlp // SMALL_WIDTH,
            layers=SMALL_BLOCKS,
            heads=heads,
            key_heads=max(1, self.key_heads // SMALL_WIDTH),
            vocabulary=SMALL_VOCABULARY,
        )

    def options(self) -> dict[str, Any]:
        """As transformers names them."""
        return dict(
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head,
            vocab_size=self.vocabulary,
            max_position_embeddings=32768,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower."""

    width: int
    mlp: int
    blocks: int
    heads: int
    image: int
    patch: int

    def small(self) -> "Tower":
        """A quarter as wide, four blocks, on the same patches."""
        return replace(
            self,
            width=self.width // SMALL_WIDTH,
            mlp=self.mlp // SMALL_WIDTH,
            blocks=SMALL_BLOCKS,
            heads=self.heads // SMALL_WIDTH,
        )

    def options(self) -> dict[str, Any]:
        """As transformers names them."""
        return dict(
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            image_size=self.image,
            patch_size=self.patch,
        )


VICUNA_7B = Decoder(4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = Decoder(5120, 13824, 40, 40, 40, 32064)
QWEN2_7B = Decoder(3584, 18944, 28, 28, 4, 152064)
QWEN3_8B = Decoder(4096, 12288, 36, 32, 8, 151936)
GEMMA3_4B = Decoder(2560, 10240, 34, 8, 4, 262208, head=256)
CLIP_L = Tower(1024, 4096, 24, 16, 336, 14)
SIGLIP_384 = Tower(1152, 4304, 26, 16, 384, 14)  # the checkpoint leaves out the last of SigLIP's 27 blocks
SIGLIP_896 = Tower(1152, 4304, 27, 16, 896, 14)
INTERN_VIT = Tower(1024, 4096, 24, 16, 448, 14)
QWEN2_VIT = Tower(1280, 5120, 32, 16, 1008, 14)
QWEN25_VIT = Tower(1280, 3420, 32, 16, 1008, 14)
QWEN3_VIT = Tower(1152, 4304, 27, 16, 1024, 16)


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Args:
        tower, decoder: its sizes.
        config: from these, the stock config.
        image: what one image is, as text.
        prompt: ids of one image with its marks, and the pixel inputs of `batch` such images.
    """

    tower: Tower
    decoder: Decoder
    config: Callable[[Tower, Decoder], Any]
    image: str
    prompt: Callable[["Arch", int], tuple[list[int], dict[str, Tensor]]]

    def small(self) -> "Arch":
        """The scaled-down twin for CPUs."""
        return replace(self, tower=self.tower.small(), decoder=self.decoder.small())


@dataclass(frozen=True)
class BuiltArch:
    """A random-weight model and prompts for it."""

    name: str
    model: Any
    arch: Arch
    is_small: bool

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """`batch` equal prompts of one image and `TEXT_TOKENS` words."""
        ids, pixels = self.arch.prompt(self.arch, batch)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(FIRST_WORD, SMALL_VOCABULARY, (TEXT_TOKENS,), generator=generator).tolist()
        row = torch.tensor([*words[: TEXT_TOKENS // 2], *ids, *words[TEXT_TOKENS // 2 :]])
        input_ids = row.expand(batch, -1).contiguous()
        found = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}
        if "image_grid_thw" in pixels:
            found["mm_token_type_ids"] = (input_ids == IMAGE).long()
        if self.model.config.model_type == "gemma3":
            found["token_type_ids"] = (input_ids == IMAGE).long()
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in found.items()
        }

    def about(self) -> dict[str, Any]:
        """Sizes, as plain data."""
        return {
            "name": self.name,
            "small": self.is_small,
            "image": self.arch.image,
            "text_tokens": TEXT_TOKENS,
            "tower": vars(self.arch.tower),
            "decoder": vars(self.arch.decoder),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def archs() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(sorted(_ARCHS))


def build(
    name: str, device: str | None = None, dtype: str = "auto", attention: str | None = None, seed: int = 0
) -> BuiltArch:
    """A random-weight model, its weights drawn where they lie; small on a CPU.

    Args:
        device: "cpu", "cuda", ...; None: CUDA if there is one.
        dtype: "float32", "bfloat16", "float16" or "auto" (float32 on CPU, bfloat16 elsewhere).
        attention: attn_implementation; None: the model's default.

    Raises:
        SpecError: no such architecture.
    """
    from transformers import AutoModelForImageTextToText

    if name not in _ARCHS:
        raise unknown_name("architecture", name, _ARCHS, "vtc bench --help")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arch, is_small = _ARCHS[name], torch.device(device).type == "cpu"
    if is_small:
        arch = arch.small()
    chosen = ("float32" if is_small else "bfloat16") if dtype == "auto" else dtype
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        config = arch.config(arch.tower, arch.decoder)
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, chosen), **options)
    return BuiltArch(name, model.eval(), arch, is_small)


def _llava(tower: Tower, decoder: Decoder) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower.options()),
        text_config=LlamaConfig(**decoder.options()),
        image_token_index=IMAGE,
    )


def _llava_next(tower: Tower, decoder: Decoder) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tower.options()),
        text_config=LlamaConfig(**decoder.options()),
        image_token_index=IMAGE,
    )


def _llava_onevision(tower: Tower, decoder: Decoder) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower.options(), vision_use_head=False),
        text_config=Qwen2Config(**decoder.options()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def _internvl(tower: Tower, decoder: Decoder) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    options = {**tower.options(), "image_size": [tower.image] * 2, "patch_size": [tower.patch] * 2}
    vision = InternVLVisionConfig(**options, attention_bias=True)
    return InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**decoder.options()),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _gemma3(tower: Tower, decoder: Decoder) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    layers = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(decoder.layers)]
    text = Gemma3TextConfig(
        **decoder.options(), query_pre_attn_scalar=decoder.head, sliding_window=1024, layer_types=layers
    )
    vision = SiglipVisionConfig(**tower.options(), vision_use_head=False)
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _qwen_ids() -> dict[str, Any]:
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def _mrope(decoder: Decoder, *shares: int, **other: Any) -> dict[str, Any]:
    section = [share * decoder.head // 128 for share in shares]
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **other}


def _qwen_text(decoder: Decoder, *shares: int, **other: Any) -> dict[str, Any]:
    return {**decoder.options(), "rope_parameters": _mrope(decoder, *shares, **other)}


def _qwen_vision(tower: Tower, decoder: Decoder, **other: Any) -> dict[str, Any]:
    """As Qwen2.5-VL and Qwen3-VL name the sizes of their towers."""
    return dict(
        depth=tower.blocks,
        hidden_size=tower.width,
        intermediate_size=tower.mlp,
        out_hidden_size=decoder.width,
        num_heads=tower.heads,
        patch_size=tower.patch,
        **other,
    )


def _qwen2_vl(tower: Tower, decoder: Decoder) -> Any:
    from transformers import Qwen2VLConfig

    vision = dict(
        depth=tower.blocks,
        embed_dim=tower.width,
        hidden_size=decoder.width,
        mlp_ratio=tower.mlp // tower.width,
        num_heads=tower.heads,
        patch_size=tower.patch,
    )
    return Qwen2VLConfig(text_config=_qwen_text(decoder, 16, 24, 24), vision_config=vision, **_qwen_ids())


def _qwen2_5_vl(tower: Tower, decoder: Decoder) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = _qwen_vision(
        tower,
        decoder,
        window_size=112,
        # the last block of each quarter sees whole images; with four blocks, the last one
        fullatt_block_indexes=sorted({tower.blocks * q // 4 - 1 for q in range(1, 5)})
        if tower.blocks > SMALL_BLOCKS
        else [tower.blocks - 1],
    )
    return Qwen2_5_VLConfig(text_config=_qwen_text(decoder, 16, 24, 24), vision_config=vision, **_qwen_ids())


def _qwen3_vl(tower: Tower, decoder: Decoder) -> Any:
    from transformers import Qwen3VLConfig

    vision = _qwen_vision(
        tower,
        decoder,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[8, 16, 24] if tower.blocks > 24 else list(range(3)),
    )
    text = _qwen_text(decoder, 24, 20, 20, mrope_interleaved=True)
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids())


def _pixels(count: int, tower: Tower, *lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, tower.image, tower.image, generator=generator).expand(count, -1, -1, -1).reshape(
        *lead, 3, tower.image, tower.image
    )  # fmt: skip


def _one_tile(arch: Arch, batch: int) -> tuple[list[int], dict[str, Tensor]]:
    tokens = (arch.tower.image // arch.tower.patch) ** 2
    return [IMAGE] * tokens, {"pixel_values": _pixels(batch, arch.tower, batch)}


def _four_tiles(arch: Arch, batch: int) -> tuple[list[int], dict[str, Tensor]]:
    """AnyRes: a base tile, two by two tiles, a newline after each of their rows."""
    side = arch.tower.image // arch.tower.patch
    tokens = side * side + 4 * side * side + 2 * side
    sizes = torch.tensor([[2 * arch.tower.image] * 2] * batch)
    return [IMAGE] * tokens, {"pixel_values": _pixels(5 * batch, arch.tower, batch, 5), "image_sizes": sizes}


def _shuffled_tiles(arch: Arch, batch: int) -> tuple[list[int], dict[str, Tensor]]:
    """InternVL: two by two tiles and a thumbnail, four patches to a token."""
    tokens = (arch.tower.image // arch.tower.patch // 2) ** 2
    return [START, *[IMAGE] * 5 * tokens, END], {"pixel_values": _pixels(5 * batch, arch.tower, 5 * batch)}


def _averaged(arch: Arch, batch: int) -> tuple[list[int], dict[str, Tensor]]:
    """Gemma 3: 256 tokens whatever the image."""
    return [START, *[IMAGE] * 256, END], {"pixel_values": _pixels(batch, arch.tower, batch)}


def _packed(arch: Arch, batch: int) -> tuple[list[int], dict[str, Tensor]]:
    """Qwen: one square image, two by two patches to a token; a still image fills both slots of a frame pair."""
    side = arch.tower.image // arch.tower.patch
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(side * side, 2 * 3 * arch.tower.patch**2, generator=generator)
    grid = torch.tensor([[1, side, side]] * batch)
    return [START, *[IMAGE] * (side * side // 4), END], {
        "pixel_values": patches.repeat(batch, 1),
        "image_grid_thw": grid,
    }


_ARCHS: dict[str, Arch] = {
    "gemma-3-4b": Arch(SIGLIP_896, GEMMA3_4B, _gemma3, "896 x 896", _averaged),
    "internvl3-8b": Arch(INTERN_VIT, replace(QWEN2_7B, vocabulary=151674), _internvl, "896 x 896", _shuffled_tiles),
    "llava-1.5-13b": Arch(CLIP_L, VICUNA_13B, _llava, "336 x 336", _one_tile),
    "llava-1.5-7b": Arch(CLIP_L, VICUNA_7B, _llava, "336 x 336", _one_tile),
    "llava-next-7b": Arch(CLIP_L, VICUNA_7B, _llava_next, "672 x 672", _four_tiles),
    "llava-onevision-7b": Arch(SIGLIP_384, QWEN2_7B, _llava_onevision, "768 x 768", _four_tiles),
    "qwen2-vl-7b": Arch(QWEN2_VIT, QWEN2_7B, _qwen2_vl, "1008 x 1008", _packed),
    "qwen2.5-vl-7b": Arch(QWEN25_VIT, QWEN2_7B, _qwen2_5_vl, "1008 x 1008", _packed),
    "qwen3-vl-8b": Arch(QWEN3_VIT, QWEN3_8B, _qwen3_vl, "1024 x 1024", _packed),
}
