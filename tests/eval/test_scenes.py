"""Scenes are a function of their seed, and every answer can be checked against the objects that were drawn."""

import importlib.util
import itertools
import random

import numpy as np
import pytest

from vtc.eval.scenes import draw
from vtc.eval.scenes.draw import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    CONTENTS,
    draw_scene,
    patch_labels,
    questions,
    scene_seed,
    scene_suite,
)

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sklearn", "skimage")),
    reason="needs pip install 'vtc-toolkit[scenes]'",
)
PLAIN = {"backgrounds": ("plain", "stripes", "checks", "dots"), "kinds": ("shape", "word")}


def _scenes(number, split="test", **options):
    return [draw_scene(scene_seed(split, index), **(options or PLAIN)) for index in range(number)]


def test_same_seed_draws_same_pixels_and_objects():
    first, second = draw_scene(7, **PLAIN), draw_scene(7, **PLAIN)
    assert first.objects == second.objects
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(draw_scene(8, **PLAIN).image))


def test_global_seeds_do_not_change_the_scene():
    drawn = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        drawn.append(np.asarray(draw_scene(3, **PLAIN).image))
    assert np.array_equal(*drawn)


def test_scenes_hold_one_to_six_objects_that_do_not_overlap():
    drawn = _scenes(60)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3, 4, 5, 6}
    for scene in drawn:
        assert scene.image.size == (192, 192)
        for index, a in enumerate(scene.objects):
            assert min(a.box) >= 0 and max(a.box) <= 192
            for b in scene.objects[index + 1 :]:
                assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]


@needs_extra
def test_every_question_is_answerable_from_the_objects():
    seen = set()
    for scene in _scenes(80, backgrounds="auto", kinds="auto"):
        for question in questions(scene, random.Random(scene.seed)):
            seen.add(question.category)
            assert question.answer in question.choices
            assert question.answer == _solve(scene, question)
    assert seen == set(CATEGORIES)


def _solve(scene, question):
    """A second way to the answer, from the words of the question."""
    shapes = [item for item in scene.objects if item.kind == "shape"]
    words = question.prompt.rstrip("?").split()
    named = [item for word in words for item in scene.objects if item.name == word]
    if question.category == "background":
        return scene.background
    if question.category in ("digit", "word"):
        (item,) = (item for item in scene.objects if item.kind == question.category)
        return item.text
    if question.category == "colour":
        (item,) = named
        return item.colour
    if question.category == "shape":
        (item,) = (item for item in shapes if item.colour == words[-1])
        return item.shape
    if question.category == "count":
        return str(len([item for item in shapes if words[2] in ("shapes", item.colour)]))
    if question.category == "existence":
        return "yes" if any(set(words[3:]) <= {item.colour, item.shape} for item in shapes) else "no"
    first, second = named
    if "left" in words:
        return "left" if first.centre[0] < second.centre[0] else "right"
    return "above" if first.centre[1] < second.centre[1] else "below"


def test_existence_questions_of_a_scene_are_half_yes():
    answers = [
        question.answer
        for scene in _scenes(60)
        for question in questions(scene, random.Random(scene.seed))
        if question.category == "existence"
    ]
    assert answers.count("yes") == answers.count("no") > 50


@needs_extra
def test_suite_is_balanced_and_repeatable():
    suite = scene_suite("test", 6, seed=1)
    again = scene_suite("test", 6, seed=1)
    assert [(scene.seed, question) for scene, question in suite] == [
        (scene.seed, question) for scene, question in again
    ]
    for category in CATEGORIES:
        assert sum(question.category == category for _, question in suite) == 6
    answers = [question.answer for _, question in suite if question.category == "existence"]
    assert answers.count("yes") == 3
    assert len({scene.seed for scene, _ in suite}) == len(suite)


def test_splits_never_share_a_seed():
    ranges = [(scene_seed(split, 0), scene_seed(split, (1 << 40) - 1)) for split in ("train", "val", "test")]
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))
    with pytest.raises(ValueError, match="index"):
        scene_seed("train", 1 << 40)
    with pytest.raises(ValueError, match="split"):
        scene_seed("holdout", 0)


@needs_extra
def test_handwritten_digits_of_splits_are_different_samples():
    def strokes(split):
        drawn = [draw._handwriting(scene_seed(split, 0), random.Random(index))[0] for index in range(200)]
        return {array.tobytes() for array in drawn}

    train, val, test = strokes("train"), strokes("val"), strokes("test")
    assert not (train & val or train & test or val & test)


def test_patch_labels_match_the_objects():
    for scene in _scenes(20):
        labels = patch_labels(scene, 24)
        assert int(labels["centre"].sum()) == len(scene.objects)
        for index, item in enumerate(scene.objects):
            cells = labels["object"] == index
            assert cells.any()
            assert (labels["content"][cells] == CONTENTS.index(item.text or item.shape)).all()
            expected = -100 if item.colour is None else list(COLOURS).index(item.colour)
            assert (labels["colour"][cells] == expected).all()
            rows, columns = cells.nonzero().T
            x0, y0, x1, y1 = (edge / 8 for edge in item.box)
            assert rows.min() >= y0 - 1 and rows.max() <= y1 and columns.min() >= x0 - 1 and columns.max() <= x1
        assert (labels["content"][labels["object"] == -1] == 0).all()


def test_labelled_patches_show_the_colour_of_their_shape():
    for scene in _scenes(20, backgrounds="plain", kinds="shape"):
        labels, pixels = patch_labels(scene, 24), np.asarray(scene.image, np.float32)
        for index, item in enumerate(scene.objects):
            # The ring's hole and the thin arms of stars show much of what lies behind.
            if item.shape in ("circle", "square") and item.size == "large":
                x, y = (int(value) for value in item.centre)
                assert labels["object"][y // 8, x // 8] == index
                assert np.abs(pixels[y, x] - COLOURS[item.colour]).max() <= 13


@pytest.mark.parametrize(
    ("argument", "name", "package"), [("backgrounds", "photo", "skimage"), ("kinds", "digit", "sklearn")]
)
def test_missing_package_is_skipped_by_auto_and_named_when_asked_for(monkeypatch, argument, name, package):
    monkeypatch.setattr(draw, "available", lambda wanted: wanted != package)
    with pytest.raises(ImportError, match=r"vtc-toolkit\[scenes\]"):
        draw_scene(0, **{argument: name})
    other = "kinds" if argument == "backgrounds" else "backgrounds"
    limited = {other: PLAIN[other], argument: "auto"}
    drawn = [draw_scene(seed, **limited) for seed in range(30)]
    assert name not in {scene.background for scene in drawn} | {item.kind for scene in drawn for item in scene.objects}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backgrounds='wallpaper'"):
        draw_scene(0, backgrounds="wallpaper")
    with pytest.raises(ValueError, match="num_objects"):
        draw_scene(0, num_objects=(0, 2))
    with pytest.raises(ValueError, match="split='train'"):
        scene_suite("train", 1, seed=0)


def test_backgrounds_are_all_drawn_when_asked_for():
    drawn = {scene.background for scene in _scenes(40)}
    assert drawn == set(BACKGROUNDS) - {"photo"}
