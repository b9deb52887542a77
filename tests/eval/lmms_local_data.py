"""Writes tiny data in the schemas of seven benchmarks, and task files that run lmms-eval's own scorers on them.

Run by test_lmms.py in a process of its own: `python lmms_local_data.py FOLDER`.
"""

import json
import random
import sys
from pathlib import Path

import datasets
import lmms_eval
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results

from vtc.eval.scenes.draw import draw_scene, questions, scene_seed

BUILT_IN = {
    "pope": ("pope/pope.yaml", "test"),
    "mme": ("mme/mme.yaml", "test"),
    "gqa": ("gqa/gqa.yaml", "testdev"),
    "textvqa": ("textvqa/textvqa_val.yaml", "validation"),
    "scienceqa": ("scienceqa/scienceqa_img.yaml", "test"),
    "mmbench": ("mmbench/mmbench_en_dev_static.yaml", "dev"),
    "vqav2": ("vqav2/vqav2_val.yaml", "validation"),
}
NUMBER = 4


def asked(category):
    """Pairs of picture and question of one category, the same in every run."""
    found = []
    for index in range(60):
        scene = draw_scene(scene_seed("val", index))
        candidates = [q for q in questions(scene, random.Random(index)) if q.category == category]
        if category == "existence":
            found += [(scene.image, question) for question in candidates[:2]]
        elif candidates:
            found.append((scene.image, candidates[0]))
    return found[:NUMBER]


def rows():
    yes_no, colours, words = asked("existence"), asked("colour"), asked("word")
    return {
        "pope": [
            {"question_id": str(i), "question": q.prompt, "answer": q.answer, "category": "random", "image": image}
            for i, (image, q) in enumerate(yes_no)
        ],
        # two questions about each picture, in a category of either half of the score
        "mme": [
            {
                "question_id": f"picture{i // 2}",
                "question": f"{q.prompt} Please answer yes or no.",
                "answer": q.answer.capitalize(),
                "category": "existence" if i < 2 else "code_reasoning",
                "image": image,
            }
            for i, (image, q) in enumerate(yes_no)
        ],
        "gqa": [{"question": q.prompt, "answer": q.answer, "image": image} for image, q in colours],
        "textvqa": [
            {
                "question_id": i,
                "question": q.prompt,
                "answers": [q.answer] * (10 - 3 * i) + ["something else"] * 3 * i,
                "ocr_tokens": [q.answer],
                "image": image,
            }
            for i, (image, q) in enumerate(words)
        ],
        "scienceqa": [
            {
                "question": q.prompt,
                "choices": [q.answer, "nothing"],
                "answer": i % 2,
                "hint": "" if i else "Look at the picture.",
                "image": image,
            }
            for i, (image, q) in enumerate(colours)
        ],
        "mmbench": [
            {
                "index": i,
                "question": q.prompt,
                "hint": "nan",
                **dict(zip("ABCD", (*(c for c in q.choices if c != q.answer), q.answer)[-4:], strict=True)),
                "answer": "D",
                "category": "attribute_recognition",
                "L2-category": "finegrained_perception (instance-level)",
                "source": "drawn",
                "split": "dev",
                "image": image,
            }
            for i, (image, q) in enumerate(colours)
        ],
        "vqav2": [
            {
                "question_id": i,
                "question": q.prompt,
                "answers": [
                    {"answer": q.answer if person >= 3 * i else "grey", "answer_confidence": "yes", "answer_id": person}
                    for person in range(10)
                ],
                "image": image,
            }
            for i, (image, q) in enumerate(colours)
        ],
    }


def task_file(name, folder):
    """lmms-eval's own task, on our rows and with the bare questions that the embedded model knows."""
    path, split = BUILT_IN[name]
    lines = [
        f"include: {Path(lmms_eval.__file__).parent / 'tasks' / path}",
        f"task: local_{name}",
        "dataset_path: parquet",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {folder / name}.parquet}}}}",
        "process_docs: null",
        "lmms_eval_specific_kwargs: {default: {pre_prompt: '', post_prompt: '', format: default}}",
        "generation_kwargs: {max_new_tokens: 4, do_sample: false, temperature: 0}",
    ]
    return "\n".join(lines) + "\n"


def letters(truths):
    """What the scorers that read option letters make of scripted answers: the embedded model gives words."""
    science = [
        sqa_process_results(row, [answer])["exact_match"]
        for row, answer in zip(truths["scienceqa"], ("A", "b", "B.", "A"), strict=True)
    ]
    bench = [
        mmbench_process_results(row, [answer])["gpt_eval_score"]
        for row, answer in zip(truths["mmbench"], ("D", "D.", "A", "B"), strict=True)
    ]
    return {"scienceqa": science, "mmbench": mmbench_evaluator.eval_result(bench, eval_method="static")[0]}


def main(folder):
    truths = {}
    for name, data in rows().items():
        dataset = datasets.Dataset.from_list(data).cast_column("image", datasets.Image())
        dataset.to_parquet(str(folder / f"{name}.parquet"))
        (folder / f"local_{name}.yaml").write_text(task_file(name, folder))
        truths[name] = [{k: v for k, v in row.items() if k != "image"} for row in data]
    truths["letters"] = letters(truths)
    (folder / "truths.json").write_text(json.dumps(truths))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
