"""Recorded runs of the authors' code on a tiny Llama, replayed through a stock LLaVA with the same weights.

The recorded prompt is a matrix of embeddings with an image span. Here every text token gets an id of its own whose
embedding is the recorded row, and the image span goes in as encoded features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.engine import Handle
from vtc.engine.handover import ATTRIBUTE, Encoded
from vtc.engine.host import names
from vtc.testing.golden import GoldenCase

PLACEHOLDER = 199


@dataclass(frozen=True)
class Replay:
    """A model that plays a recorded case.

    Args:
        model: stock LLaVA whose LLM has the recorded weights.
        input_ids: [1, L] the prompt.
        features: [N, D] the image span.
        decode_ids: ids of the recorded decode steps.
    """

    model: Any
    input_ids: Tensor
    features: Tensor
    decode_ids: tuple[int, ...]

    def prefill(self, handle: Handle) -> Any:
        """The inner model's output for the prompt, under `handle`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output = BaseModelOutputWithPooling(pooler_output=[self.features])  # type: ignore[arg-type]
        adapter = handle._adapter
        lengths, layout = adapter.layout(adapter.encoders[0], output, {})
        setattr(output, ATTRIBUTE, Encoded(handle._plan, lengths, layout, None, 0.0))
        with torch.no_grad():
            return self.model.model(input_ids=self.input_ids, mm_encoder_outputs={"image": output}, use_cache=True)

    def decode(self, step: int, cache: Any) -> Any:
        """The inner model's output for decode step `step`."""
        with torch.no_grad():
            return self.model.model(
                input_ids=torch.tensor([[self.decode_ids[step]]]), **names.cache_argument(self.model.model, cache)
            )


def replay(
    case: GoldenCase, span: tuple[int, int], decode: Sequence[Tensor] = (), *, model_type: str = "llama", **text: Any
) -> Replay:
    """The model and prompt of a recorded case.

    Args:
        case: arrays `w.*` or `w_*` (weights by their Hugging Face names) and `inputs_embeds` [1, L, D] or `x` [L, D].
        span: first and one-past-last place of the image.
        decode: [D] embeddings of decode steps.
        model_type: of the LLM.
        text: fields of its config beside those read off the weights.
    """
    embeds = case["inputs_embeds"][0] if "inputs_embeds" in case else case["x"]
    weights = {name[2:].removeprefix("model."): case[name] for name in case.arrays if name[:2] in ("w.", "w_")}
    model = _llava_of(weights, embeds.shape[1], round((span[1] - span[0]) ** 0.5), model_type, text)
    text_rows = torch.cat([embeds[: span[0]], embeds[span[1] :], *(d.reshape(1, -1) for d in decode)])
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[: len(text_rows)] = text_rows
    before, after = span[0], len(embeds) - span[1]
    ids = [*range(before), *[PLACEHOLDER] * (span[1] - span[0]), *range(before, before + after)]
    steps = tuple(range(before + after, len(text_rows)))
    return Replay(model, torch.tensor([ids]), embeds[span[0] : span[1]], steps)


def _llava_of(weights: Mapping[str, Tensor], width: int, side: int, model_type: str, text: Mapping[str, Any]) -> Any:
    """A LLaVA with side x side image tokens whose LLM has `weights`; its tower and its embeddings are random."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = AutoConfig.for_model(
        model_type,
        hidden_size=width,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        vocab_size=PLACEHOLDER + 1,
        pad_token_id=None,
        **text,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=4 * side,
        patch_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=config, image_token_index=PLACEHOLDER)
        ).eval()
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"embed_tokens.weight", "norm.weight"}, missing
    return model
