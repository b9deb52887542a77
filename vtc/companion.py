"""A CLIP model beside the vision-language model, for methods that compare patches with the question.

Vision-language checkpoints hold CLIP's vision tower at most: neither its text tower nor the two projections into the
joint space of images and texts. Whoever wants a method that reads that space (`cdpruner`) hands the rest over:

    clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336")
    words = AutoTokenizer.from_pretrained("openai/clip-vit-large-patch14-336")
    vtc.patch(model, "cdpruner:64", companion=vtc.ClipCompanion(clip, words, processor))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vtc.adapter import Encoder
from vtc.errors import UnsupportedModelError


def in_clip(encoder: Encoder) -> str | None:
    """Why the features of `encoder` are no hidden states of CLIP, or None where they are."""
    tower: Any = encoder.tower
    if getattr(tower.config, "model_type", None) != "clip_vision_model":
        return f"its tower {type(tower).__name__} is no CLIP tower, so its patches share no space with CLIP's text"
    if encoder.features is None or encoder.pool is not None or len(encoder.feature_layers) > 1:
        return "its features are no single hidden state of CLIP"
    return None


@dataclass(frozen=True, eq=False)
class ClipCompanion:
    """CLIP's joint space for one vision-language model.

    The patches are those that the vision-language model's own tower made (no second image encoder runs): CLIP's last
    norm and projection are applied to what enters the projector. The question is read from the prompt: the text behind
    the last image, or all text where none follows, decoded without special tokens. A chat template may leave the name
    of a role at its end; `question` can cut that off, or return another text.

    Args:
        clip: a loaded `CLIPModel`, of the checkpoint that the vision tower was taken from.
        tokenizer: CLIP's tokenizer, or its processor.
        decoder: the tokenizer (or processor) of the vision-language model, whose `decode` turns ids into text.
        question: from the decoded text to what CLIP's text tower reads; default: without spaces at the ends.

    Raises:
        UnsupportedModelError: `clip` has no text tower or projections.
    """

    clip: Any
    tokenizer: Any
    decoder: Any
    question: Callable[[str], str] = str.strip

    def __post_init__(self) -> None:
        parts = ("vision_model", "text_model", "visual_projection", "text_projection")
        missing = [part for part in parts if not isinstance(getattr(self.clip, part, None), nn.Module)]
        if missing:
            raise UnsupportedModelError(
                f"a companion of type {type(self.clip).__name__} lacks {' and '.join(missing)}. "
                "Load the whole of it: CLIPModel.from_pretrained(...)."
            )
        if not hasattr(self.decoder, "decode"):
            raise UnsupportedModelError(
                f"decoder={type(self.decoder).__name__} has no decode. "
                "Pass the processor or the tokenizer of the vision-language model."
            )

    def unfit(self, encoder: Encoder) -> str | None:
        """Why the features of `encoder` have no place in CLIP's joint space, or None where they have."""
        reason = in_clip(encoder)
        if reason is not None:
            return reason
        tower: Any = encoder.tower
        width, own = self.clip.visual_projection.in_features, tower.config.hidden_size
        if width != own:
            return (
                f"the companion's vision tower is {width} wide and the model's {own}. "
                "Load the CLIP checkpoint that the model's tower was taken from"
            )
        return None

    @torch.no_grad()
    def image_embeds(self, features: Float[Tensor, "G N C"]) -> Float[Tensor, "G N E"]:
        """Patches in the joint space: visual_projection(post_layernorm(features)), not normalised."""
        weight = self.clip.visual_projection.weight
        hidden = features.to(weight.device, weight.dtype)
        embeds: Tensor = self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden))
        return embeds.to(features.device)

    @torch.no_grad()
    def text_embeds(self, ids: Sequence[Sequence[int]], device: torch.device) -> Float[Tensor, "B M E"]:
        """Questions in the joint space, one row for each piece as long as CLIP's context; zero rows are padding."""
        words = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        context = self.clip.config.text_config.max_position_embeddings
        home = self.clip.text_projection.weight.device
        pieces, counts = [], []
        for row in ids:
            text = self.question(self.decoder.decode(list(row), skip_special_tokens=True))
            tokens = list(words(text, truncation=False)["input_ids"])
            count = max(1, -(-len(tokens) // context))
            rows = torch.zeros(2, count * context, dtype=torch.long)
            rows[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            rows[1, : max(1, len(tokens))] = 1
            pieces.append(rows.view(2, count, context))
            counts.append(count)
        given, mask = torch.cat(pieces, dim=1).to(home)
        # a piece that is all padding behind the end still needs one visible token
        mask[:, 0] = 1
        pooled = self.clip.text_model(input_ids=given, attention_mask=mask).pooler_output
        embeds = self.clip.text_projection(pooled).to(device)
        return nn.utils.rnn.pad_sequence(list(embeds.split(counts)), batch_first=True)
