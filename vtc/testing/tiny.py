"""Random-weight models of every family, small enough for a test, built from stock configs without any download."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: a prompt as pieces: a number of text tokens, or "image"
Prompt = Sequence[int | str]

#: three prompts that differ in length, place and number of images; the last has none
PROMPTS: tuple[Prompt, ...] = ((3, "image", 5), ("image", 4, "image", 2), (6,))


@dataclass(frozen=True)
class TinyModel:
    """A tiny model and how to make prompts for it."""

    family: str
    model: Any
    image_tokens: int
    placeholder: int
    image_size: int

    def inputs(self, prompts: Sequence[Prompt] = PROMPTS[:1], seed: int = 0, padding: str = "left") -> dict[str, Tensor]:
        """Model inputs for `prompts`, padded to the longest, with random text and images."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = []
        images = 0
        for prompt in prompts:
            row: list[int] = []
            for piece in prompt:
                if isinstance(piece, str):
                    row += [self.placeholder] * self.image_tokens
                    images += 1
                else:
                    row += torch.randint(5, 150, (piece,), generator=generator).tolist()
            rows.append(row)
        width = max(len(row) for row in rows)
        ids, mask = [], []
        for row in rows:
            pad = [0] * (width - len(row))
            ids.append(pad + row if padding == "left" else row + pad)
            ones = [1] * len(row)
            mask.append(pad + ones if padding == "left" else ones + pad)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if images:
            size = self.image_size
            inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
        return inputs


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


def _llava(attention: str, layers: int) -> TinyModel:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = LlamaConfig(
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
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=199, pad_token_id=0)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation(attention)
    return TinyModel("llava", model, image_tokens=16, placeholder=199, image_size=28)


_BUILDERS: dict[str, Callable[[str, int], TinyModel]] = {"llava": _llava}
