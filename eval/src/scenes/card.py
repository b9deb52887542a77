"""The card of the embedded model, written from its `training.json`.

python -m vtc.eval.scenes.card model_cards/scenes-llava
"""

import json
import sys
from pathlib import Path
from typing import Any


def card(record: dict[str, Any]) -> str:
    """The README of the model: data, accuracy, training and limits, every number out of `record`."""
    dense, kept = record["dense"], record["random_11_percent"]
    rows = "\n".join(f"| {name} | {_share(dense[name])} | {_share(kept[name])} |" for name in dense)
    stages = "\n".join(
        f"| `{s['name']}` | {s['grid']} x {s['grid']} = {s['grid'] ** 2} | {s['steps']} | {s['batch']} "
        f"| {s['learning_rate']} | {s['num_objects'][0]}-{s['num_objects'][1]} |"
        for s in record["preset"]["stages"]
    )
    log = record["log"]
    curve = "\n".join(
        f"| {x['step']} | {x['stage']} | {x['content']:.2f} | {x['cls']:.2f} | {_loss(x, 'answer')} "
        f"| {_loss(x, 'description')} |"
        for x in [*log[:-1:8], log[-1]]
    )
    history = "\n".join(f"- {line}" for line in record["history"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lowest, weakest = min((dense[name]["accuracy"], name) for name in dense if name != "overall")
    cls, questions = record["cls_attention"], dense["colour"]["questions"]
    weak = (
        f"- **{weakest.capitalize()} questions are its weakness** ({100 * lowest:.1f} %). Differences between methods in "
        "this category say less than in the others.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, synthetic-data, token-compression]
---

# scenes-llava

A very small LLaVA that was trained from nothing to answer questions about drawn scenes. It exists so that visual-token
compression can be tried, tested and measured on a CPU, without a network, on a model whose answers really depend on its
visual tokens. It is a stock `LlavaForConditionalGeneration`; no remote code.

| part | what |
|---|---|
| tower | CLIP, 192 x 192 pixels, patch 8, width {record["preset"]["tower_width"]}, {record["preset"]["tower_layers"]} layers, with [CLS]; features of the last but one layer, [CLS] dropped |
| visual tokens | 24 x 24 = 576, as in LLaVA-1.5, so that budgets of 192, 128, 64 and 32 mean the same share |
| decoder | Llama, width {record["preset"]["width"]}, {record["preset"]["layers"]} layers, {record["preset"]["num_heads"]} heads, a word-level vocabulary of {record["vocabulary"]} entries |
| size | {record["parameters"] / 1e6:.2f} million parameters, {record["weights_megabytes"]} MB in fp16 |

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vtc.eval.scenes.draw import draw_scene, scene_seed

folder = "model_cards/scenes-llava"
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
scene = draw_scene(scene_seed("test", 5))
prompt = "USER: <image>\\nhow many shapes are there? ASSISTANT:"
inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

## Data

Everything is drawn by `vtc/eval/scenes/draw.py` from a seed: 1 to 6 objects that do not overlap. Objects are shapes (circle,
square, triangle, star, cross, ring) in six colours and two sizes (14-18 and 24-32 pixels), at most one handwritten digit
and at most one of sixteen short words, on plain, striped, checked, dotted or photographic backgrounds. Handwritten digits
are those of scikit-learn's `load_digits`; one sample in ten is kept for validation and one for the test. Photographs are
random crops of five public-domain or CC0 pictures of scikit-image (astronaut, chelsea, coffee, rocket,
hubble_deep_field); the same five pictures serve training and test, in other crops. Training, validation and test scenes
come from disjoint ranges of seeds.

Questions follow one template per kind: colour, shape, count, existence (half yes, half no, half of the harder negatives
combine a colour and a shape that are both in the picture), relation (left or right, above or below, of two objects whose
centres lie at least 32 pixels apart), digit, word, background.

## Accuracy on held-out scenes

{questions} questions per category (`scene_suite("test", {record["suite"]["num_per_category"]}, seed=0)`), one question per scene, answer exactly right, in per
cent (right/asked, Wilson 95 % interval). Weights as shipped, computed in fp32. The right column keeps {record["random_11_percent"]["tokens"]}
of 576 visual tokens (11 %), drawn at random, with their position ids. Chance is 50 % for existence and relation.

| category | all 576 tokens | random 11 % |
|---|---|---|
{rows}

The weakest category is {weakest} with {100 * lowest:.1f} %.

## Training

```
{record["command"]}
```

Seed {record["seed"]}, {record["steps"]} steps, {record["pictures"]} pictures, {record["minutes"]:.0f} minutes of wall time on two CPU cores that other work shared ({versions}).

| stage | visual tokens | steps | pictures per step | peak learning rate | objects |
|---|---|---|---|---|---|
{stages}

1. `tower`: dense labels at the feature layer (content, colour, centre, place, background), and a multi-label loss on [CLS]
   of that layer, so that its attention to the patches is learnt. Both losses stay on in the later stages.
2. `window`: tower and decoder on 14 x 14 windows of the final grid, with the positions the window has inside that grid.
3. `full`: all 576 tokens.

Each picture carries its visual tokens once, a description of the scene and up to sixteen questions that do not see each other.

This run was steered by hand while it went, so the command alone does not repeat it bit for bit:

{history}

Losses (means over 50 steps; every row is in `training.json`, with quick validation accuracies):

| step | stage | dense content | [CLS] | answers | description |
|---|---|---|---|---|---|
{curve}

The answer loss of different stages is not comparable: the mixture of questions changed (see the list above).

## Limits

{weak}- It answers about drawn scenes of the kind above, with the templates above. It knows {record["vocabulary"]} words; others become `<unk>`.
- On photographs it shows what happens to tokens, not knowledge: it was never shown what photographs contain.
- Five photographs and one font were used. It does not read other words than its sixteen, and digits only in that style.
- The [CLS] attention of the feature layer looks at objects because a loss asked [CLS] what the scene holds: {100 * cls["on_objects"]:.0f} %
  of it lies on objects, which cover {100 * cls["object_cells"]:.0f} % of the cells ({cls["scenes"]} val scenes). Methods that rank tokens by it may look better
  here than on models that were trained otherwise.
- Numbers on this model compare methods under one small, known task. They say nothing about absolute quality on real benchmarks.
"""


def _share(row: dict[str, Any]) -> str:
    low, high = row["wilson95"]
    return f"{100 * row['accuracy']:.1f} ({row['right']}/{row['questions']}, {100 * low:.1f}-{100 * high:.1f})"


def _loss(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "-"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(card(json.loads((folder / "training.json").read_text())))
