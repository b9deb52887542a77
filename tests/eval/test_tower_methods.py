"""Inside the tower of the embedded model: learned features survive merging, and the tower gets cheaper."""

import itertools
from collections import Counter

import pytest
import torch

import vtc
from vtc.engine.vision.call import ENCODE
from vtc.eval.bench.accuracy import Prepared, score
from vtc.eval.data.suites import scenes
from vtc.loading import load

TOKENS = 96  # of 576


@pytest.fixture(scope="module")
def prepared():
    return Prepared(load(attention="sdpa"), scenes(per_category=3), batch_size=12)


def accuracy(prepared, spec):
    with vtc.compress(prepared.loaded.model, spec) as handle:
        answers = prepared.answers(handle)
    assert {n for report in answers.reports for n in report.after_last_cut} == {TOKENS}
    right = score(prepared.suite, answers)["correct"]
    return right.count("1") / len(right)


@pytest.mark.parametrize("slug", ["tome", "ficoco-v", "token-transforming"])
def test_accuracy_is_far_above_chance(prepared, slug):
    """Chance is the answer that is most often right in its category, picked after the fact."""
    answers = {}
    for item in prepared.suite.items:
        answers.setdefault(item.category, Counter())[item.answers[0]] += 1
    chance = sum(max(counts.values()) for counts in answers.values()) / len(prepared.suite.items)
    assert accuracy(prepared, f"{slug}:{TOKENS}") >= chance + 0.15


def test_the_tower_runs_on_fewer_tokens(prepared):
    """Blocks really see shorter sequences, and what leaves the tower has stock shapes."""
    model = prepared.loaded.model
    tower = model.model.vision_tower
    lengths, shapes = [], []
    hooks = [b.mlp.register_forward_hook(lambda m, a, o: lengths.append(o.shape[1])) for b in tower.encoder.layers]
    pixels = prepared.batches[0]["pixel_values"]
    with vtc.compress(model, f"tome:{TOKENS}"), torch.no_grad():
        hooks.append(tower.register_forward_hook(lambda m, a, o: shapes.append(o.last_hidden_state.shape[1])))
        model.model.get_image_features(pixels)
    for hook in hooks:
        hook.remove()
    # each acting block runs its MLP once silenced, on all it has, and once on what stays
    steps = [577 - (576 - TOKENS) * i // 5 for i in range(6)]
    assert lengths == [n for pair in itertools.pairwise(steps) for n in pair] + [TOKENS + 1]
    assert shapes == [577]
    assert ENCODE.get() is None
