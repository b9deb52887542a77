"""The drawn scenes as lmms-eval tasks `vtc_scenes_<category>`: functions that the task files in `tasks/` name.

The data file only says how many questions and which seed; questions and pictures are drawn here, so nothing is
downloaded, and the questions are those of `vtc bench` with the same numbers.
"""

import functools
from typing import Any

from vtc.eval.scenes.draw import Question, Scene, scene_suite


@functools.lru_cache(maxsize=2)
def suite(per_category: int, seed: int) -> tuple[tuple[Scene, Question], ...]:
    """The held-out questions of all categories, drawn once."""
    return tuple(scene_suite("test", per_category, seed))


def process_docs(dataset: Any) -> Any:
    """A `datasets.Dataset` with the questions of one category, which is the name of the split."""
    from datasets import Dataset

    settings = dataset[0]
    drawn = suite(settings["per_category"], settings["seed"])
    rows = [
        {"index": index, "question": question.prompt, "answer": question.answer, **settings}
        for index, (_, question) in enumerate(drawn)
        if question.category == str(dataset.split)
    ]
    return Dataset.from_list(rows, split=dataset.split)


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The picture that a question is about."""
    return [suite(doc["per_category"], doc["seed"])[doc["index"]][0].image]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question, with the words that make models answer in one word."""
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the right word, in any case and with or without a full stop, else 0."""
    return {"exact_match": float(results[0].strip().rstrip(".").lower() == doc["answer"])}
