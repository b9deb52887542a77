"""The main job: one image and one question, with all visual tokens and with a budget, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vtc.adapter import adapter_for
from vtc.engine import compress
from vtc.errors import VTCError
from vtc.eval.bench.costs import observed_encoder
from vtc.eval.results.environment import Environment, environment
from vtc.eval.results.timing import Timing, compare
from vtc.loading import Loaded
from vtc.picture import draw, pictures
from vtc.report import Report


@dataclass(frozen=True)
class RunResult:
    """What `vtc run` prints.

    Args:
        question, answer_dense, answer: the text asked and both answers.
        expected: the true answer, where the image was drawn here.
        report: figures of the compressed prefill.
        encoder_flops: FLOPs of vision tower and projector, "dense" and "compressed".
        ttft: milliseconds from pixels to the first token, "dense" and "compressed".
        overlay: where the picture was written; None: nowhere.
        notes: the report's, and why there is no picture.
    """

    model: str
    question: str
    answer_dense: str
    answer: str
    expected: str | None
    report: Report
    encoder_flops: dict[str, int]
    ttft: dict[str, Timing]
    overlay: str | None
    notes: tuple[str, ...]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        report = self.report
        return {
            "model": self.model,
            "spec": report.spec,
            "question": self.question,
            "answer_dense": self.answer_dense,
            "answer": self.answer,
            "expected": self.expected,
            "tokens": {
                "before": report.visual_tokens[0],
                "entering_llm": report.entering[0],
                "after_last_cut": report.after_last_cut[0],
                "layer_average": report.layer_average[0],
                "text": report.text_tokens[0],
            },
            "flops": {
                "llm_prefill_dense": report.flops_dense,
                "llm_prefill": report.flops,
                "vision_encoder_dense": self.encoder_flops["dense"],
                "vision_encoder": self.encoder_flops["compressed"],
            },
            "ttft_ms": {name: vars(timing) for name, timing in self.ttft.items()},
            "selection_ms": sum(report.selection_ms.values()),
            "selection_ms_by_site": report.selection_ms,
            "kv_bytes": {"dense": report.kv_bytes_dense, "compressed": report.kv_bytes},
            "notes": list(self.notes),
            "overlay": self.overlay,
            "environment": self.environment,
        }


def run(
    loaded: Loaded,
    image: Image.Image,
    question: str,
    spec: str,
    budget: int | float | str | None,
    *,
    positions: str = "auto",
    max_new_tokens: int = 32,
    repeats: int = 7,
    picture: Path | None = None,
    expected: str | None = None,
) -> RunResult:
    """Answer `question` about `image` twice and measure both.

    Args:
        repeats: timed calls for each time to first token; the two take turns.
        picture: where the overlay is written, None for none.

    Raises:
        VTCError: whatever the spec, the model or the image is refused for, before anything ran compressed.
    """
    model = loaded.model
    inputs = loaded.inputs(image, question)
    length = inputs["input_ids"].shape[1]

    def generate(new_tokens: int) -> torch.Tensor:
        with torch.inference_mode():
            ids: torch.Tensor = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return ids

    def compressed(new_tokens: int) -> torch.Tensor:
        with compress(model, spec, budget, positions=positions):
            return generate(new_tokens)

    adapter = adapter_for(model)
    with compress(model, spec, budget, positions=positions) as handle:
        with observed_encoder(adapter) as encoder:
            answer = loaded.answer(generate(max_new_tokens)[0], length)
        report = handle.report
    with observed_encoder(adapter) as encoder_dense:
        answer_dense = loaded.answer(generate(max_new_tokens)[0], length)
    ttft = compare({"dense": lambda: generate(1), "compressed": lambda: compressed(1)}, model.device, runs=repeats)
    notes = report.notes
    if picture is not None:
        try:
            draw(report, pictures(model, inputs, loaded.processor)).save(picture)
        except (VTCError, OSError, ValueError) as error:  # also a path that cannot be written, or no image format
            notes, picture = (*notes, f"no picture: {error}"), None
    return RunResult(
        model=loaded.name,
        question=question,
        answer_dense=answer_dense,
        answer=answer,
        expected=expected,
        report=report,
        encoder_flops={
            "dense": encoder_dense.tower + encoder_dense.projector,
            "compressed": encoder.tower + encoder.projector,
        },
        ttft=ttft,
        overlay=str(picture) if picture is not None else None,
        notes=notes,
        environment=environment(model.device),
    )
