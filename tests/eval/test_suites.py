"""Own questions, and what counts as a right answer."""

import dataclasses
import json

import pytest
from PIL import Image

import vtc
from vtc.errors import UnsupportedFeatureError
from vtc.eval.bench.accuracy import Prepared
from vtc.eval.data import suites
from vtc.loading import Loaded


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red", ["red"], True),
        ("Red.", ["red"], True),
        ("a red  circle", ["Red circle"], True),
        ("reddish", ["red"], False),
        ("red circle", ["red"], False),
        ("", ["red"], False),
        ("two", ["2", "two"], True),
    ],
)
def test_right_answers(answer, expected, right):
    assert suites.is_right(answer, expected) is right


def write(folder, *rows):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))
    return path


def test_own_questions(tmp_path):
    path = write(
        tmp_path,
        {"image": "a.png", "question": "q1", "answer": "x", "category": "colour"},
        "",
        {"image": "a.png", "question": "q2", "answer": ["x", "y"]},
    )
    suite = suites.from_file(path)
    assert [item.answers for item in suite.items] == [("x",), ("x", "y")]
    assert suite.categories == ("colour", "all")
    assert len(suites.from_file(path, limit=1).items) == 1


def test_changed_questions_are_another_suite(tmp_path):
    row = {"image": "a.png", "question": "q", "answer": "x"}
    before = suites.from_file(write(tmp_path, row)).about
    assert suites.from_file(write(tmp_path, {**row, "answer": "y"})).about != before


@pytest.mark.parametrize("row", ["{", '"text"', {"image": "a.png", "question": "q"}, {"question": "q", "answer": "x"}])
def test_lines_that_are_no_question(tmp_path, row):
    with pytest.raises(vtc.VTCError, match="line 1"):
        suites.from_file(write(tmp_path, row))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(vtc.VTCError, match="no file of questions"):
        suites.from_file(tmp_path / "none.jsonl")
    with pytest.raises(vtc.VTCError, match="holds no question"):
        suites.from_file(write(tmp_path, ""))
    with pytest.raises(vtc.VTCError, match="no image at"):
        suites.from_file(write(tmp_path, {"image": "b.png", "question": "q", "answer": "x"}))


def test_questions_are_about_images_so_far(tmp_path):
    suite = suites.from_file(write(tmp_path, {"image": "a.png", "question": "q", "answer": "x"}))
    assert [item.media for item in suite.items] == ["image"]
    clip = dataclasses.replace(suite.items[0], media="video")
    with pytest.raises(UnsupportedFeatureError, match="'q' is about a video"):
        Prepared(Loaded("m", None, None), dataclasses.replace(suite, items=(clip,)), 1)
