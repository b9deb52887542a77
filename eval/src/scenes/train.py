"""Train the small LLaVA of `model_cards/scenes-llava` on drawn scenes, on a CPU, and export it.

    python -m vtc.eval.scenes.train --out runs/scenes --preset cpu --export model_cards/scenes-llava

On two cores one process per core is faster than two threads:

    python -m torch.distributed.run --nproc-per-node 2 -m vtc.eval.scenes.train --threads 1 --out runs/scenes ...

The model is a stock `LlavaForConditionalGeneration`, a CLIP tower with [CLS] and a Llama decoder. Stages:

1. `tower`: the tower alone learns, from 14 x 14 cells of the final 24 x 24 grid, dense labels at its feature layer
   (content, colour, centre, position, background) and, on [CLS], which attributes the picture holds.
2. `window`: tower and decoder learn together on such windows. Position embeddings and RoPE positions are those that the
   window has inside the full grid, so that the full picture only brings more tokens.
3. `full`: the same with all 24 x 24 = 576 tokens; the learning rate falls to zero at the end.

Each picture is one sequence: the visual tokens once, then a description of the scene and many questions, each of which
attends to the visual tokens and to itself only and is placed right after them. Every question therefore sees exactly
what it sees at inference. A run stops and resumes from `OUT/checkpoint.pt`; the same seed, steps and package versions
give the same pictures and questions.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtc.eval.results.intervals import accuracy_table
from vtc.eval.scenes.card import card
from vtc.eval.scenes.draw import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    CONTENTS,
    KINDS,
    MAX_OBJECTS,
    SHAPES,
    Question,
    Scene,
    draw_scene,
    patch_labels,
    questions,
    scene_seed,
    scene_suite,
)
from vtc.kernels import attention_rows

PATCH = 8
GRID = 24
PROMPT = "USER: <image>\n{question} ASSISTANT:"
DESCRIBE = "describe the scene."
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Attributes of a whole picture, the targets of the [CLS] head.
ATTRIBUTES = (*CONTENTS[1:], *COLOURS)


@dataclass(frozen=True)
class Stage:
    """One part of the schedule; `grid` is the side of the window in cells."""

    name: str
    grid: int
    batch: int
    steps: int
    learning_rate: float
    num_objects: tuple[int, int]


@dataclass(frozen=True)
class Preset:
    """Sizes of the model and the schedule."""

    stages: tuple[Stage, ...]
    tower_width: int = 128
    tower_layers: int = 6
    width: int = 128
    layers: int = 8
    num_heads: int = 4
    questions_per_image: int = 16
    tower_rate: float = 0.3
    decay_share: float = 0.4


PRESETS = {
    "cpu": Preset(
        (
            Stage("tower", 14, 32, 1000, 4e-3, (6, 9)),
            Stage("window", 14, 8, 2500, 2.5e-3, (1, 4)),
            Stage("full", 24, 8, 1450, 2.5e-3, (1, MAX_OBJECTS)),
        )
    ),
    "smoke": Preset(
        (
            Stage("tower", 6, 2, 2, 1e-3, (1, 1)),
            Stage("window", 6, 2, 2, 1e-3, (1, 1)),
            Stage("full", 24, 1, 1, 1e-3, (1, 6)),
        ),
        tower_width=32,
        tower_layers=2,
        width=32,
        num_heads=2,
    ),
}


def build_processor() -> LlavaProcessor:
    """The stock processor: 192-pixel pictures, 576 image tokens, a word-level tokenizer of the closed vocabulary."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = (
        "user assistant : ? . , what colour is the how many shapes are there a left or right of above below which digit"
    )
    words += " shown word written background describe scene shape yes no and in picture image an object objects this"
    last = ["none", "where", "column", "row"]
    vocabulary = [
        *special,
        *dict.fromkeys([*words.split(), *(c for c in CONTENTS if c), *COLOURS, *BACKGROUNDS, *last]),
    ]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor\b"), "colour")]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    side = GRID * PATCH
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(preset: Preset, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained model; LLaVA-1.5 conventions: features of the last but one tower layer, without [CLS]."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=preset.tower_width,
        intermediate_size=3 * preset.tower_width,
        num_hidden_layers=preset.tower_layers,
        num_attention_heads=preset.tower_width // 32,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        projection_dim=preset.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.width,
        intermediate_size=32 * round(preset.width * 8 / 3 / 32),
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_heads,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config)
    _start_with_neighbours(model.model.vision_tower)
    model.generation_config = GenerationConfig(
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


class Heads(nn.Module):
    """Linear read-outs that exist in training only: dense ones on the feature layer, one on [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, len(CONTENTS) + len(COLOURS) + len(BACKGROUNDS) + 1 + 2 + 3 + 16)
        self.cls = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ATTRIBUTES) + MAX_OBJECTS + 1))
        self.last_cls = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ATTRIBUTES) + MAX_OBJECTS + 1))

    def forward(self, patches: Tensor, cls: Tensor, last_cls: Tensor, target: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [len(CONTENTS), len(COLOURS), len(BACKGROUNDS), 1, 2, 3, 16]
        content, colour, background, centre, position, offset, mask = (
            self.dense(self.norm(patches)).float().split(sizes, -1)
        )
        weight = torch.ones(len(CONTENTS))
        weight[0] = 0.05
        found = target["content"] > 0
        losses = {
            "content": F.cross_entropy(content.flatten(0, 1), target["content"].flatten(), weight, ignore_index=-100),
            "colour": F.cross_entropy(colour.flatten(0, 1), target["colour"].flatten(), ignore_index=-100),
            "background": F.cross_entropy(background.mean(1), target["background"]),
            "centre": F.binary_cross_entropy_with_logits(
                centre[..., 0], target["centre"].float(), pos_weight=torch.tensor(10.0)
            ),
            "position": F.mse_loss(position, target["position"]),
            "offset": F.smooth_l1_loss(offset[found], target["offset"][found]),
            "mask": F.binary_cross_entropy_with_logits(mask, target["mask"]),
        }
        for name, head, token in (("cls", self.cls, cls), ("last_cls", self.last_cls, last_cls)):
            attributes, number = head(token).float().split([len(ATTRIBUTES), MAX_OBJECTS + 1], -1)
            losses[name] = 4 * F.binary_cross_entropy_with_logits(attributes, target["attributes"])
            losses[name] = losses[name] + 0.3 * F.cross_entropy(number, target["number"])
        # The dense labels carry the stage; the rest only has to leave its trace.
        losses["total"] = losses["content"] + losses["colour"] + 0.3 * losses["background"] + losses["centre"]
        losses["total"] = (
            losses["total"]
            + losses["position"]
            + losses["offset"]
            + losses["mask"]
            + 0.5 * losses["cls"]
            + 0.25 * losses["last_cls"]
        )
        right = (content.argmax(-1) == target["content"]).float()
        for kind, first, last in zip(KINDS, (1, 7, 17), (7, 17, len(CONTENTS)), strict=True):
            losses[f"{kind}_accuracy"] = (
                right[(target["content"] >= first) & (target["content"] < last)].mean().nan_to_num()
            )
        return losses


class Packer:
    """Turns scenes into batches: pixels, dense labels, and one packed text sequence for each picture."""

    def __init__(self, processor: LlavaProcessor, questions_per_image: int) -> None:
        self.processor = processor
        self.num_questions = questions_per_image
        self.segment, self.description = 16, 40
        self._ids: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.prefix = self.encode("", "")[0]
        self.num_text = questions_per_image * self.segment + self.description

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids before the picture, and of what follows it up to the end of the answer."""
        key = (question, answer)
        if key not in self._ids:
            ids = self.processor.tokenizer(PROMPT.format(question=question) + answer + "</s>")["input_ids"]
            place = ids.index(self.processor.image_token_id)
            self._ids[key] = ids[:place], ids[place + 1 :]
        return self._ids[key]

    def batch(self, scenes: list[Scene], rng: random.Random, with_lessons: bool = True) -> dict:
        """A batch; text `ids` and `labels` are `[B, T]`, labels are -100 where nothing is to be learnt."""
        grid = scenes[0].image.width // PATCH
        ids = torch.full((len(scenes), self.num_text), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(scenes), self.num_text), -100)
        asked: list[list[Question]] = []
        corners = [(rng.randint(0, GRID - grid), rng.randint(0, GRID - grid)) for _ in scenes]
        for row, scene in enumerate(scenes):
            chosen = _spread(questions(scene, rng), rng)
            if with_lessons:
                chosen = chosen[: self.num_questions - 8] + lessons(scene, *corners[row], rng)
            chosen = chosen[: self.num_questions]
            asked.append(chosen)
            texts = [(question.prompt, question.answer) for question in chosen] + [(DESCRIBE, describe(scene))]
            starts = [self.segment * k for k in range(len(chosen))] + [self.segment * self.num_questions]
            for start, (prompt, answer) in zip(starts, texts, strict=True):
                tokens = self.encode(prompt, answer)[1]
                num_answer = len(answer.split()) + 1
                ids[row, start : start + len(tokens)] = torch.tensor(tokens)
                # Position p predicts the token at p + 1.
                end = start + len(tokens)
                labels[row, end - num_answer - 1 : end - 1] = torch.tensor(tokens[-num_answer:])
        pixels = torch.stack(
            [torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8) for scene in scenes]
        )
        pixels = pixels.view(len(scenes), grid * PATCH, grid * PATCH, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        cells = torch.stack([_window(top, left, grid) for top, left in corners])
        return {
            "pixels": pixels.contiguous(),
            "cells": cells,
            "ids": ids,
            "labels": labels,
            "questions": asked,
            "target": _targets(scenes, cells, grid),
        }

    def mask(self, num_visual: int) -> Tensor:
        """Who may look at whom, `[1, 1, L, L]` with 0 and -inf: causal, and no question sees another one."""
        start = len(self.prefix) + num_visual
        bounds = [start + self.segment * k for k in range(self.num_questions + 1)] + [start + self.num_text]
        visible = torch.zeros(start + self.num_text, start + self.num_text, dtype=torch.bool)
        visible[:, :start] = True
        for first, last in itertools.pairwise(bounds):
            visible[first:last, first:last] = True
        return torch.zeros(visible.shape).masked_fill(~visible.tril(), -torch.inf)[None, None]

    def text_positions(self) -> Tensor:
        """RoPE positions of the text: every question starts right after the full picture."""
        start = len(self.prefix) + GRID * GRID
        return start + torch.cat(
            [torch.arange(self.segment).repeat(self.num_questions), torch.arange(self.description)]
        )


def lessons(scene: Scene, top: int, left: int, rng: random.Random) -> list[Question]:
    """Questions that only training asks, at most eight: where things are in the full grid, and about what is not there.

    They teach the steps that relation and existence consist of; without them both stay at chance for long.
    """
    shapes = [item for item in scene.objects if item.kind == "shape"]
    names = [item.name for item in scene.objects]
    absent = [shape for shape in SHAPES if shape not in names]
    missing = [colour for colour in COLOURS if colour not in {item.colour for item in shapes}]
    noun = rng.choice(SHAPES)
    asked = [Question("count", f"how many {noun} shapes are there?", str(names.count(noun)), ())]
    if missing:
        asked.append(Question("shape", f"what shape is {rng.choice(missing)}?", "none", ()))
    if absent:
        asked.append(Question("colour", f"what colour is the {rng.choice(absent)}?", "none", ()))
    asked = rng.sample(asked, 1)
    places = []
    for item in scene.objects:
        if names.count(item.name) == 1:
            x, y = (c / PATCH + o for c, o in zip(item.centre, (left, top), strict=True))
            eighths = f"{int(x * 8 / GRID)} {int(y * 8 / GRID)}"
            side, height = "left" if x < GRID / 2 else "right", "above" if y < GRID / 2 else "below"
            places.append(Question("where", f"where is the {item.name}?", eighths, ()))
            places.append(Question("where", f"is the {item.name} left or right?", side, ()))
            places.append(Question("where", f"is the {item.name} above or below?", height, ()))
    asked += rng.sample(places, min(4, len(places)))
    again = [question for _ in range(3) for question in questions(scene, rng) if question.category == "relation"]
    return asked + again[: 8 - len(asked)]


def describe(scene: Scene) -> str:
    """The objects in reading order, as in "red circle , digit 7 ,"."""
    names = [f"{item.colour} {item.shape} ," if item.shape else f"{item.kind} {item.text} ," for item in scene.objects]
    return " ".join(names)


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Feature layer of a window, `[B, 1 + N, D]`, and [CLS] after the last layer, which does not train the others."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    cls = embeddings.class_embedding.expand(len(pixels), 1, -1)
    places = F.pad(cells + 1, (1, 0))
    hidden = tower.pre_layrnorm(torch.cat([cls, patches], 1) + embeddings.position_embedding(places))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden, tower.encoder.layers[-1](hidden.detach(), attention_mask=None)[:, 0]


def answer_logits(model: LlavaForConditionalGeneration, packer: Packer, batch: dict, features: Tensor) -> Tensor:
    """Logits at every position with a label, in row-major order."""
    visual = model.model.multi_modal_projector(features[:, 1:])
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(packer.prefix)).expand(len(visual), -1, -1)
    hidden = torch.cat([prefix, visual, embed(batch["ids"])], 1)
    num_prefix = len(packer.prefix)
    positions = torch.cat(
        [
            torch.arange(num_prefix).expand(len(visual), -1),
            num_prefix + batch["cells"],
            packer.text_positions().expand(len(visual), -1),
        ],
        1,
    )
    hidden = model.model.language_model(
        inputs_embeds=hidden, attention_mask=packer.mask(visual.shape[1]), position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, -packer.num_text :][batch["labels"] != -100]).float()


def train(preset: Preset, seed: int, out: Path, deadline: float = math.inf) -> dict:
    """Run or resume all stages; returns the state with `model`, `processor` and the `log` of losses."""
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(preset, processor)
    heads = Heads(preset.tower_width)
    packer = Packer(processor, preset.questions_per_image)
    optimizers = _optimizers(model, heads)
    checkpoint = out / "checkpoint.pt"
    state = _resume(checkpoint, model, heads, optimizers)
    total = sum(stage.steps for stage in preset.stages)
    started = time.time() - state["seconds"]
    recent: dict[str, list[float]] = {}
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [*model.parameters(), *heads.parameters()]
    stop = time.time() >= deadline
    while state["step"] < total and not stop:
        stage, step_in_stage = _stage_at(preset, state["step"])
        first = state["pictures"] + (seed << 24)
        seeds = [scene_seed("train", first + k) for k in range(rank, stage.batch, num_ranks)]
        scenes = [_draw(stage, s) for s in seeds]
        batch = packer.batch(scenes, random.Random(seeds[0]))
        if stage.name == "window" and step_in_stage == 0:
            _pass_places_on(model, packer, stage)
        _set_rates(optimizers, preset, stage, step_in_stage)
        loss, losses = _losses(model, heads, packer, batch, stage)
        loss.backward()
        stop = _average_gradients(parameters, num_ranks, time.time() >= deadline)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        state["pictures"] += stage.batch
        state["seconds"] = time.time() - started
        for name, value in losses.items():
            recent.setdefault(name, []).append(value.item())
        done = stop or state["step"] == total
        if rank:
            continue
        if state["step"] % 50 == 0 or done:
            row = {"step": state["step"], "stage": stage.name, "minutes": round(state["seconds"] / 60, 1)}
            row |= {name: round(sum(values) / len(values), 4) for name, values in recent.items()}
            recent.clear()
            if stage.name != "tower" and (state["step"] % 200 == 0 or done):
                row["accuracy"] = _quick_accuracy(model, packer, stage)
            state["log"].append(row)
            print(json.dumps(row), flush=True)
        if state["step"] % 100 == 0 or done:
            _save(checkpoint, model, heads, optimizers, state)
    return state | {"model": model, "processor": processor}


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    suite: list[tuple[Scene, Question]],
    keep: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[int, int]]:
    """Right answers and questions per category; `keep` visual tokens stay, drawn at random, with their position ids.

    Every answer is one token, so the token with the highest logit after the prompt is what greedy decoding writes.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = {category: [0, 0] for category in CATEGORIES}
    model.eval()
    for scene, question in suite:
        inputs = processor(images=scene.image, text=PROMPT.format(question=question.prompt), return_tensors="pt")
        ids = inputs["input_ids"]
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        embeds = model.get_input_embeddings()(ids).clone()
        is_visual = ids[0] == processor.image_token_id
        embeds[0, is_visual] = features
        stay = ~is_visual
        order = torch.randperm(len(features), generator=generator)[:keep]
        stay[is_visual.nonzero()[order, 0]] = True
        positions = stay.nonzero().T
        logits = model.model.language_model(inputs_embeds=embeds[:, stay], position_ids=positions).last_hidden_state
        token = model.lm_head(logits[:, -1]).argmax(-1).item()
        counts[question.category][0] += processor.tokenizer.decode([token]).strip() == question.answer
        counts[question.category][1] += 1
    return {category: (right, number) for category, (right, number) in counts.items()}


@torch.no_grad()
def attention_on_objects(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, num_scenes: int = 24
) -> dict[str, float]:
    """Share of the feature layer's [CLS] attention that lies on objects, and the share of cells that they cover."""
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    captured: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: captured.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    shares = []
    for index in range(num_scenes):
        scene = draw_scene(scene_seed("val", index))
        model.model.vision_tower(processor.image_processor(scene.image, return_tensors="pt")["pixel_values"])
        q, k = (captured[n].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for n in ("q_proj", "k_proj"))
        row = attention_rows(q[:, :, :1], k)[0, 0, 1:]
        is_object = patch_labels(scene, GRID)["object"].flatten() >= 0
        shares.append((row[is_object].sum() / row.sum(), is_object.float().mean()))
    for hook in hooks:
        hook.remove()
    mass, area = torch.tensor(shares).mean(0).tolist()
    return {"on_objects": round(mass, 3), "object_cells": round(area, 3), "scenes": num_scenes}


def export(
    state: dict, preset: Preset, command: str, seed: int, num_per_category: int, folder: Path, history: list[str]
) -> dict:
    """Evaluate with fp16-rounded weights; write model, processor, `training.json` and card, then swap the folder."""
    model, processor = state["model"], state["processor"]
    model.half().float().eval()
    suite = scene_suite("test", num_per_category, seed=0)
    kept = round(0.11 * GRID * GRID)
    record = {
        "command": command,
        "seed": seed,
        "steps": state["step"],
        "pictures": state["pictures"],
        "minutes": round(state["seconds"] / 60, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(processor.tokenizer),
        "history": history,
        "cls_attention": attention_on_objects(model, processor),
        "preset": asdict(preset),
        "versions": {"python": sys.version.split()[0]}
        | {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")}
        | {name: metadata.version(name) for name in ("scikit-learn", "scikit-image")},
        "suite": {"split": "test", "num_per_category": num_per_category, "seed": 0},
        "dense": accuracy_table(evaluate(model, processor, suite)),
        "random_11_percent": {"tokens": kept} | accuracy_table(evaluate(model, processor, suite, keep=kept)),
        "log": state["log"],
    }
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.half().save_pretrained(staging)
    processor.save_pretrained(staging)
    (staging / "model.safetensors").chmod(0o644)
    record["weights_megabytes"] = round((staging / "model.safetensors").stat().st_size / 1e6, 1)
    (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (staging / "README.md").write_text(card(record))
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    shutil.rmtree(old, ignore_errors=True)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m vtc.eval.scenes.train", description="Train the scenes LLaVA.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", help="steps of every stage, instead of the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; a later call resumes")
    parser.add_argument("--export", type=Path, help="folder of the finished model")
    parser.add_argument("--note", action="append", default=[], help="a change by hand during the run, for the card")
    parser.add_argument("--per-category", type=int, default=150, help="held-out questions per category at export")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    preset = PRESETS[options.preset]
    if options.steps:
        stages = [Stage(**{**asdict(s), "steps": n}) for s, n in zip(preset.stages, options.steps, strict=True)]
        preset = Preset(**{**preset.__dict__, "stages": tuple(stages)})
    options.out.mkdir(parents=True, exist_ok=True)
    state = train(preset, options.seed, options.out, time.time() + 60 * options.minutes)
    if options.export and os.environ.get("RANK", "0") == "0":
        steps = " ".join(str(stage.steps) for stage in preset.stages)
        command = (
            f"python -m vtc.eval.scenes.train --preset {options.preset} --seed {options.seed} --steps {steps} "
            "--out runs/scenes --export model_cards/scenes-llava"
        )
        record = export(state, preset, command, options.seed, options.per_category, options.export, options.note)
        print(json.dumps({name: record[name] for name in ("dense", "random_11_percent")}, indent=1))


def _draw(stage: Stage, seed: int) -> Scene:
    return draw_scene(
        seed,
        size=stage.grid * PATCH,
        backgrounds=BACKGROUNDS,
        kinds=KINDS,
        num_objects=stage.num_objects,
        crowded=stage.name == "tower",
    )


def _spread(asked: list[Question], rng: random.Random) -> list[Question]:
    """Questions in random order, one of every category before the second of any."""
    groups = {category: [question for question in asked if question.category == category] for category in CATEGORIES}
    ranked = []
    for group in groups.values():
        rng.shuffle(group)
        ranked += [(rank, rng.random(), question) for rank, question in enumerate(group)]
    return [question for _, _, question in sorted(ranked, key=lambda item: item[:2])]


def _window(top: int, left: int, grid: int) -> Tensor:
    """Indices in the full grid of the cells of a window, row by row."""
    return ((top + torch.arange(grid))[:, None] * GRID + left + torch.arange(grid)).flatten()


def _targets(scenes: list[Scene], cells: Tensor, grid: int) -> dict[str, Tensor]:
    labels = [patch_labels(scene, grid) for scene in scenes]
    target = {name: torch.stack([item[name].flatten(0, 1) for item in labels]) for name in labels[0]}
    target["background"] = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    target["position"] = torch.stack([cells // GRID, cells % GRID], -1) / (GRID / 2) - 1
    target["number"] = torch.tensor([min(len(scene.objects), MAX_OBJECTS) for scene in scenes])
    target["attributes"] = torch.zeros(len(scenes), len(ATTRIBUTES))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            for value in (item.shape, item.colour, item.text):
                if value is not None:
                    target["attributes"][row, ATTRIBUTES.index(value)] = 1
    return target


def _average_gradients(parameters: list[nn.Parameter], num_ranks: int, stop: bool) -> bool:
    """Mean of the gradients over all processes; true when any of them wants to stop, so that all stop together."""
    if num_ranks == 1:
        return stop
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(parameter.grad.flatten() for parameter in trained), torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    sizes = [parameter.numel() for parameter in trained]
    for parameter, gradient in zip(trained, (flat[:-1] / num_ranks).split(sizes), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
    return flat[-1].item() > 0


def _losses(
    model: LlavaForConditionalGeneration, heads: Heads, packer: Packer, batch: dict, stage: Stage
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is minimised in a stage, and its parts."""
    with torch.autocast("cpu", torch.bfloat16):
        features, last_cls = tower_features(model, batch["pixels"], batch["cells"])
        losses = heads(features[:, 1:], features[:, 0], last_cls, batch["target"])
        if stage.name == "tower":
            return losses["total"], losses
        logits = answer_logits(model, packer, batch, features)
        losses |= _answer_losses(logits, batch["labels"], packer)
        return 0.3 * losses["total"] + losses["answer"] + 0.5 * losses["description"], losses


def _answer_losses(logits: Tensor, labels: Tensor, packer: Packer) -> dict[str, Tensor]:
    is_question = torch.arange(packer.num_text) < packer.segment * packer.num_questions
    is_question = is_question.expand_as(labels)[labels != -100]
    target = labels[labels != -100]
    losses = F.cross_entropy(logits, target, reduction="none")
    return {"answer": losses[is_question].mean(), "description": losses[~is_question].mean()}


@torch.no_grad()
def _start_with_neighbours(tower: nn.Module) -> None:
    """Sine and cosine position embeddings, and keys equal to queries: at first a cell looks at cells near and like it.

    From random positions the tower needs many more steps until cells of one object find each other.
    """
    width = tower.embeddings.embed_dim
    frequency = 1.5 * (1 / 24) ** torch.linspace(0, 1, width // 4)
    angle = torch.arange(GRID)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], -1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    tower.embeddings.position_embedding.weight[1:] = 0.15 * torch.cat([rows, columns], -1).flatten(0, 1)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=1.3 * width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


@torch.no_grad()
def _pass_places_on(model: LlavaForConditionalGeneration, packer: Packer, stage: Stage, num_scenes: int = 64) -> None:
    """Let four hidden units of the projector carry each cell's column and row, about as strong as the rest.

    The tower knows places, but in directions so faint that the decoder does not find them: relation stays at chance.
    Column and row are fitted by least squares; gelu(a) - gelu(-a) = a carries them unchanged.
    """
    scenes = [_draw(stage, scene_seed("train", (1 << 39) + k)) for k in range(num_scenes)]
    batch = packer.batch(scenes, random.Random(0))
    features = tower_features(model, batch["pixels"], batch["cells"])[0][:, 1:].flatten(0, 1)
    places = batch["target"]["position"].flatten(0, 1)
    weight = (1 + 9 * (batch["target"]["content"].flatten() > 0).float()).sqrt()[:, None]
    inputs = F.pad(features, (0, 1), value=1.0)
    fitted = torch.linalg.lstsq(inputs * weight, places * weight).solution.T
    projector = model.model.multi_modal_projector
    hidden = projector.act(projector.linear_1(features))
    output = projector.linear_2(hidden)
    weakest = (hidden.std(0) * projector.linear_2.weight.norm(dim=0)).argsort()[:4].view(2, 2)
    for axis, (plus, minus) in enumerate(weakest.tolist()):
        direction = torch.randn(output.shape[1]) * 0.6 * output.var(0).mean().sqrt() / places[:, axis].std()
        for unit, sign in ((plus, 1.0), (minus, -1.0)):
            projector.linear_1.weight[unit] = sign * fitted[axis, :-1]
            projector.linear_1.bias[unit] = sign * fitted[axis, -1]
            projector.linear_2.weight[:, unit] = sign * direction


def _optimizers(model: nn.Module, heads: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; the tower is the first group of both."""
    groups: dict[str, list] = {"muon tower": [], "muon": [], "adamw tower": [], "adamw": []}
    for name, parameter in [*model.named_parameters(), *heads.named_parameters()]:
        kind = "muon" if parameter.ndim == 2 and "layers." in name else "adamw"
        groups[kind + (" tower" if "vision_tower" in name else "")].append(parameter)
    muon = [{"params": groups[name]} for name in ("muon tower", "muon")]
    adamw = [{"params": groups[name]} for name in ("adamw tower", "adamw")]
    return [
        torch.optim.Muon(muon, lr=0.0, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _set_rates(optimizers: list, preset: Preset, stage: Stage, step: int) -> None:
    """Short linear rise when parts are new, then constant, then a linear fall at the end of the last stage."""
    rate = stage.learning_rate * (min(1.0, (step + 1) / 100) if stage.name != "full" else 1.0)
    if stage is preset.stages[-1]:
        rate *= min(1.0, (stage.steps - step) / max(1.0, preset.decay_share * stage.steps))
    for optimizer in optimizers:
        tower, rest = optimizer.param_groups
        tower["lr"] = rate if stage.name == "tower" else rate * preset.tower_rate
        rest["lr"] = rate


def _stage_at(preset: Preset, step: int) -> tuple[Stage, int]:
    for stage in preset.stages:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise IndexError("past the last step")


@torch.no_grad()
def _quick_accuracy(model: LlavaForConditionalGeneration, packer: Packer, stage: Stage, num_scenes: int = 64) -> dict:
    """Teacher-forced accuracy per category on val scenes of the stage's size."""
    counts = {category: [0, 0] for category in CATEGORIES}
    for start in range(0, num_scenes, 16):
        seeds = [scene_seed("val", start + k) for k in range(16)]
        scenes = [_draw(stage, s) for s in seeds]
        batch = packer.batch(scenes, random.Random(start), with_lessons=False)
        # Only the first token of each question's answer is scored.
        labels = batch["labels"].clone()
        labels[:, packer.segment * packer.num_questions :] = -100
        labels[:, 1:][batch["labels"][:, :-1] != -100] = -100
        batch["labels"] = labels
        with torch.autocast("cpu", torch.bfloat16):
            features, _ = tower_features(model, batch["pixels"], batch["cells"])
            logits = answer_logits(model, packer, batch, features)
        right = (logits.argmax(-1) == labels[labels != -100]).tolist()
        categories = [question.category for asked in batch["questions"] for question in asked]
        for category, is_right in zip(categories, right, strict=True):
            counts[category][0] += is_right
            counts[category][1] += 1
    return {category: round(right / max(1, number), 3) for category, (right, number) in counts.items()}


def _resume(path: Path, model: nn.Module, heads: nn.Module, optimizers: list) -> dict:
    """The state of the checkpoint, whose weights are loaded; where there is none, that of a new run."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "log": [], "pictures": 0}
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    heads.load_state_dict(saved["heads"])
    for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return saved["state"]


def _save(path: Path, model: nn.Module, heads: nn.Module, optimizers: list, state: dict) -> None:
    staging = path.with_suffix(".new")
    values = {"model": model.state_dict(), "heads": heads.state_dict(), "state": state}
    torch.save(values | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, staging)
    os.replace(staging, path)


if __name__ == "__main__":
    main()
