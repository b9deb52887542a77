"""Downsample: the tower on a smaller image, its features at even places, and the models that cannot do it."""

import functools

import pytest
import torch
from torch.nn.functional import interpolate

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import names
from vtc.methods.downsample import smaller_grid
from vtc.testing import families, masked_logits, relative_difference, tiny, visible_columns
from vtc.testing.conformance import check_method
from vtc.testing.tiny import PROMPTS
from vtc.tokens import Layout

RUNS = ("internvl", "llava", "paligemma", "video_llava")


@functools.cache
def built(family, attention="sdpa"):
    return tiny(family, attention)


@pytest.mark.parametrize(
    ("shape", "budget", "square", "expected"),
    [
        ((24, 24), 576, False, (24, 24)),
        ((24, 24), 192, False, (13, 14)),
        ((24, 24), 128, False, (11, 11)),
        ((24, 24), 64, False, (8, 8)),
        ((24, 24), 32, False, (5, 6)),
        ((24, 24), 7, False, (2, 3)),
        ((24, 24), 1, False, (1, 1)),
        ((12, 24), 32, False, (4, 8)),
        ((24, 6), 16, False, (8, 2)),
        ((1, 30), 9, False, (1, 9)),
        ((16, 16), 32, True, (5, 5)),
        ((16, 16), 1, True, (1, 1)),
    ],
)
def test_smaller_grid(shape, budget, square, expected):
    assert smaller_grid(shape, budget, square) == expected


def test_no_grid_exceeds_its_budget_or_its_shape():
    for height, width in ((24, 24), (27, 27), (5, 9)):
        for budget in range(1, height * width + 1):
            rows, cols = smaller_grid((height, width), budget)
            assert rows * cols <= budget
            assert rows <= height
            assert cols <= width


def test_conformance():
    check_method(vtc.create("downsample", budget=6))


def test_cells_cover_the_grid_evenly():
    stage = vtc.create("downsample").stages()[0]
    layout = Layout.grid(6, 6)
    tokens = vtc.Tokens.of(torch.zeros(1, 36, 2), 9, layout, square_grid=torch.tensor([False]))
    token_map = stage.decide(tokens)
    assert token_map.lengths == (9,)
    assert token_map.anchor.tolist() == [[7, 9, 11, 19, 21, 23, 31, 33, 35]]
    assert token_map.sizes().tolist() == [[4.0] * 9]
    assert token_map.sources().view(6, 6)[:2].tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    torch.testing.assert_close(token_map.matrix().sum(2), torch.ones(1, 9))


def stock_features(one, pixels, grid):
    """What the stock model makes of images that are scaled to `grid` tokens, [images, tokens, D]."""
    adapter = adapter_for(one.model)
    (encoder, *_) = adapter.encoders
    shape = tuple(n * encoder.resize.token for n in grid)
    small = interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
    if one.family == "internvl":
        return one.model.model.get_image_features(small).pooler_output
    hidden = []
    hook = encoder.feature_layers[-1].register_forward_hook(lambda m, a, out: hidden.append(out))
    last = encoder.tower(small, interpolate_pos_encoding=True).last_hidden_state
    hook.remove()
    x = last if one.family == "paligemma" else hidden[0][:, encoder.num_prefix :]
    return encoder.features(x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("budget", "grid"), [(9, (3, 3)), (7, (2, 3)), (4, (2, 2)), (1, (1, 1))])
@pytest.mark.parametrize("family", RUNS)
def test_equals_the_stock_model_on_smaller_images(family, budget, grid, attention):
    """Its features at the anchors, everything else masked: the oracle of every merge before the LLM."""
    one = built(family, attention)
    if family == "internvl":
        grid = (min(grid),) * 2
    inputs = one.inputs(PROMPTS)
    with vtc.compress(one.model, f"downsample:{budget}", positions="original") as handle, torch.no_grad():
        out = one.model(**inputs, use_cache=True)
        report = handle.report
    with torch.no_grad():
        pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
        features = stock_features(one, pixels, grid)
    assert features.shape[1] == grid[0] * grid[1]
    visible = visible_columns(names.cache_of(out), inputs["input_ids"].shape[1])
    is_visual = inputs["input_ids"] == one.placeholder
    kept = visible(0) & is_visual
    assert int(kept.sum()) == features.shape[0] * features.shape[1]
    expected = masked_logits(one.model, inputs, visible, replace=(kept, features.flatten(0, 1)))
    rows = visible(0) & inputs["attention_mask"].bool()
    assert relative_difference(out.logits[rows], expected[rows]) < 1e-5
    assert report.entering == tuple((kept.sum(1)).tolist())
    assert report.selection_ms["tower_out"] > 0


@pytest.mark.parametrize("family", RUNS)
def test_a_budget_that_covers_all_changes_nothing(family):
    one = built(family)
    inputs = one.inputs(PROMPTS)
    with torch.no_grad():
        before = one.model(**inputs).logits
        with vtc.compress(one.model, "downsample:999"):
            assert torch.equal(one.model(**inputs).logits, before)
        with vtc.compress(one.model, "downsample:4"):
            assert not torch.equal(one.model(**inputs).logits, before)
        assert torch.equal(one.model(**inputs).logits, before)


def test_goes_with_methods_behind_it():
    """The signal of the smaller grid stands at the places of its tokens."""
    one = built("llava")
    inputs = one.inputs(PROMPTS)
    for spec, left in (
        ("downsample:9 + divprune:5", 5),
        ("downsample:9 + fastv@2:4", 4),
        ("downsample:9 + todre:4", 4),
    ):
        with vtc.compress(one.model, spec, positions="original") as handle:
            one.model.generate(**inputs, max_new_tokens=2)
        per_image = handle.report.after_last_cut[0]
        assert per_image == left
    with vtc.compress(one.model, "downsample:9", size_bias=True), torch.no_grad():
        assert torch.isfinite(one.model(**inputs).logits).all()


@pytest.mark.parametrize("family", sorted(set(families()) - set(RUNS)))
def test_refused_with_the_reason(family):
    with pytest.raises(errors.UnsupportedFeatureError, match=r"processor|fixed grid"):
        vtc.patch(built(family).model, "downsample:4")


def test_refused_beside_methods_in_the_tower():
    model = built("llava").model
    for spec in ("downsample:9 + fastervlm:4", "downsample:9 + downsample:4"):
        with pytest.raises(errors.UnsupportedFeatureError, match="Use one of them"):
            vtc.patch(model, spec)
    with pytest.raises(errors.UnsupportedFeatureError, match="per='image'"):
        vtc.patch(model, "downsample:9(per=sample)")


def test_videos_of_a_model_whose_images_can():
    one = built("video_llava")
    inputs = one.inputs([(3, "video", 2)])
    with (
        vtc.compress(one.model, "downsample:4"),
        torch.no_grad(),
        pytest.raises(errors.UnsupportedFeatureError, match=r"\[CLS\] stays among its tokens"),
    ):
        one.model(**inputs)
