"""Pictures of reports: what went into a model comes back as a picture, and is dark where the report says so."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import vtc
from vtc import errors
from vtc.adapter import Picture, adapter_for
from vtc.eval.bench.prompt import run
from vtc.eval.cli._shown import show_run
from vtc.loading import Loaded, load
from vtc.picture import BACKGROUND, DROPPED, GAP, TINT, arrange, cell, draw, pictures
from vtc.testing import families, tiny
from vtc.testing.processors import processor_for, save_checkpoint
from vtc.testing.tiny import MIXED_PROMPTS

#: 5.22 warns of the name that its own processor of Video-LLaVA gives to pixels
pytestmark = pytest.mark.filterwarnings("ignore:`pixel_values_images` is deprecated:FutureWarning")

VIDEO = [family for family in families() if tiny(family).has_video]
#: what the stock processors make of a picture: a square out of its middle, or all of it in another shape
CROPPED = ("llava", "video_llava")
#: mean difference of colours, where hosts scale with another filter than the test
CLOSE = 0.03
SPECS = ["random:40%", "visionzip:40%(score=received)", "fastv@3:5(per=sample)", "pool:40%"]


def photograph(width, height):
    """Red tells the column, green the row, and blue marks one corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns / (width - 1), rows / (height - 1), (columns < width / 3) & (rows < height / 4)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).round().astype(np.uint8))


@pytest.fixture
def words(monkeypatch):
    """SmolVLM's processor wants a package that spells the number of frames out."""
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)


def close(pixels, image):
    """Whether [3, H, W] shows `image`, scaled."""
    _, height, width = pixels.shape
    expected = (
        torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    )
    off = (pixels - expected).abs()[:, 1:-1, 1:-1]
    return off[:2].max() < 0.1 and off.mean() < CLOSE


def joined(picture):
    """The tiles of `picture` as one, put together again cell by cell."""
    tiles = [segment for i, segment in enumerate(picture.segments) if i != picture.overview]
    rows, columns = picture.tiles
    assert len(tiles) == rows * columns
    return torch.cat([torch.cat(tiles[r * columns : (r + 1) * columns], dim=2) for r in range(rows)], dim=1)


def unpadded(pixels):
    """Without black rows and columns around them."""
    seen = pixels.sum(0) > 0.02
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    return pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@pytest.mark.usefixtures("words")
class TestWhatWentIn:
    @pytest.mark.parametrize("size", [(180, 120), (60, 150)], ids=["landscape", "portrait"])
    @pytest.mark.parametrize("family", families())
    def test_an_image(self, family, size):
        """The stock processor's pixels of a picture, put together again, are the picture."""
        one, image = tiny(family), photograph(*size)
        processor = processor_for(one)
        (picture,) = pictures(one.model, inputs_for(one, processor, image), processor)
        expected = ImageOps.fit(image, (100, 100)) if family in CROPPED else image
        assert close(unpadded(joined(picture)), expected)
        if picture.overview is not None:
            assert close(unpadded(picture.segments[picture.overview]), image)
        tiled = family in ("llava_next", "llava_next_video", "internvl", "idefics3", "smolvlm")
        assert (math.prod(picture.tiles) > 1) == tiled
        assert (picture.overview is not None) == (tiled or family == "llava_onevision")
        if family.startswith("qwen"):
            assert (joined(picture).shape[1] > joined(picture).shape[2]) == (size[1] > size[0])

    @pytest.mark.parametrize("family", ["idefics3", "smolvlm", "internvl", "llava_next", "llava_onevision", "qwen2_vl"])
    def test_a_batch_with_several_images_in_a_prompt(self, family):
        one = tiny(family)
        processor = processor_for(one)
        sizes = ((180, 120), (60, 150), (120, 120), (200, 50))
        images = [photograph(*size) for size in sizes]
        mark = Loaded("", one.model, processor).prompt("").split()[0]
        text = [f"{mark} {mark} what", f"what {mark}", f"{mark}"]
        nested = [images[:2], images[2:3], images[3:]]
        inputs = processor(images=nested, text=text, return_tensors="pt", padding=True)
        found = pictures(one.model, inputs, processor)
        assert len(found) == len(images)
        for number, (picture, image) in enumerate(zip(found, images, strict=True)):
            if family == "llava_onevision" and number < 2:  # images beside others are squared with grey, and not tiled
                image = ImageOps.pad(image, (100, 100), color=(122, 117, 104))
                assert picture.overview is None
            assert close(unpadded(picture.segments[picture.overview or 0]), image)
            assert close(unpadded(joined(picture)), image)

    @pytest.mark.parametrize("family", VIDEO)
    def test_a_video(self, family):
        """Frames come back in their order; of frames that share a patch the first."""
        one = tiny(family)
        processor = processor_for(one)
        square = Image.new("RGB", (84, 84))
        frames = []
        for number in range(4):
            square.paste((60 * number, 255 - 60 * number, 10), (0, 0, 84, 84))
            square.paste(photograph(42, 42), (42 * (number % 2), 42 * (number // 2)))
            frames.append(square.copy())
        stacked = np.stack([np.array(frame) for frame in frames])
        settings = {"do_sample_frames": False} if hasattr(processor.video_processor, "do_sample_frames") else {}
        clip = processor.video_processor(videos=[stacked], return_tensors="pt", **settings)
        (picture,) = pictures(one.model, clip, processor)
        assert picture.modality == "video"
        assert picture.tiles is None
        shown = frames[::2] if family.startswith("qwen") else frames
        assert len(picture.segments) == len(shown)
        for segment, frame in zip(picture.segments, shown, strict=True):
            _, height, width = segment.shape
            expected = np.array(frame.resize((width, height), Image.Resampling.BICUBIC)) / 255
            assert (segment - torch.from_numpy(expected).permute(2, 0, 1)).abs().mean() < CLOSE

    def test_without_a_processor_the_range_of_values_is_the_range_of_colours(self):
        one, image = tiny("qwen2_vl"), photograph(90, 60)
        inputs = inputs_for(one, processor_for(one), image)
        (picture,) = pictures(one.model, inputs)
        assert float(picture.segments[0].min()) == 0
        assert float(picture.segments[0].max()) == 1
        red = picture.segments[0][0]
        assert (red.diff(dim=1) > 0).all()  # still a gradient


def inputs_for(one, processor, image):
    return Loaded(one.family, one.model, processor).inputs(image, "what is this ?")


def panels(page, size):
    """The two panels of a page with one picture, [H, W, 3]."""
    left = page.crop((GAP, GAP, GAP + size[0], GAP + size[1]))
    right = page.crop((2 * GAP + size[0], GAP, 2 * GAP + 2 * size[0], GAP + size[1]))
    return (torch.from_numpy(np.array(panel)).float() for panel in (left, right))


def cells(report, groups, boxes):
    """(box, group of the layout, token) of every cell of a picture; no token (None) lies on padding."""
    layout, boxes = report.layout, iter(boxes)
    for group in groups:
        places = torch.stack([layout.segment[group], layout.row[group], layout.col[group]], dim=1)
        token_at = {tuple(place): i for i, place in enumerate(places[: report.media[group].tokens].tolist())}
        for segment, grid in enumerate(layout.grids[group]):
            box = next(boxes)
            for row in range(grid[0]):
                for column in range(grid[1]):
                    yield cell(box, grid, row, column), group, token_at.get((segment, row, column))


def inside(panel, box):
    """The pixels of a cell without its frame, [pixels, 3]."""
    left, top, right, bottom = box
    return panel[top + 3 : bottom - 2, left + 3 : right - 2].flatten(0, 1)


def prefill(one, inputs, spec):
    with vtc.compress(one.model, spec) as handle, torch.no_grad():
        one.model(**inputs)
    return handle.report


def check_page(page, report, picture, groups):
    """That `page` shows the picture and what became of its tokens, those of `groups` of the layout; how many what."""
    size, boxes = arrange(picture, [grid for group in groups for grid in report.layout.grids[group]])
    left, right = panels(page, size)
    for (start, top, end, bottom), segment in zip(boxes, picture.segments, strict=True):
        shown = left[top : bottom + 1, start : end + 1].permute(2, 0, 1) / 255
        back = nn.functional.interpolate(shown[None], segment.shape[1:], mode="area")[0]
        assert (back - segment).abs().mean() < 0.05  # not one segment in another's place
    mass, pooled = report.token_map.matrix(mass=True), len(report.samples) < len(report.media)
    fates = dict.fromkeys(("kept", "dropped", "merged", "padding"), 0)
    tints = {}
    for box, group, token in cells(report, groups, boxes):
        before, after = inside(left, box), inside(right, box)
        if token is None:
            fates["padding"] += 1
            assert (after == torch.tensor(BACKGROUND)).all()
            continue
        sample = report.media[group].sample
        if pooled:  # tokens are counted through all images of a sample
            token += sum(other.tokens for other in report.media[:group] if other.sample == sample)
        row = report.samples.index(sample) if pooled else group
        slot = int(mass[row, :, token].argmax())
        into = (mass[row].argmax(0) == slot) & (mass[row].sum(0) > 0)
        if not into[token]:
            fates["dropped"] += 1
            dark = torch.tensor(DROPPED[:3])
            assert (after - before - (dark - before) * DROPPED[3] / 255).abs().max() < 2
        elif into.sum() > 1:
            fates["merged"] += 1
            tints.setdefault((row, slot), []).append((255 * after - (255 - TINT) * before).mean(0) / TINT)
        else:
            fates["kept"] += 1
            assert torch.equal(before, after)
    for tint in tints.values():
        assert (torch.stack(tint) - tint[0]).abs().max() < 3  # one colour for all that are merged
    assert len({tuple(tint[0].round().tolist()) for tint in tints.values()}) >= min(len(tints), 21)
    return fates


@pytest.mark.usefixtures("words")
class TestWhatBecameOfIt:
    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("family", families())
    def test_every_cell(self, family, spec):
        """Kept ones are as they were, dropped ones dark, merged ones tinted alike, and padding is left out."""
        one = tiny(family)
        processor = processor_for(one)
        inputs = inputs_for(one, processor, photograph(180, 60))
        report = prefill(one, {name: part for name, part in inputs.items() if name != "labels"}, spec)
        (picture,) = pictures(one.model, inputs, processor)
        fates = check_page(draw(report, [picture]), report, picture, range(len(report.media)))
        assert (fates["merged"] > 0) == spec.startswith(("visionzip", "pool"))
        if not spec.startswith("visionzip"):  # which merges nothing in tiles that keep one token
            assert (fates["dropped"] > 0) == (not spec.startswith("pool"))
        assert (fates["padding"] > 0) == family.startswith("llava_next")  # only there do layouts know of padding

    @pytest.mark.parametrize("spec", ["random:5", "fastv@3:5(per=sample)", "random:9 + pool:3"])
    @pytest.mark.parametrize("family", VIDEO)
    def test_images_and_videos_of_a_batch(self, family, spec):
        """Each picture is shown with its own tokens, also where a stage sees all images of a prompt as one group."""
        one = tiny(family)
        inputs = one.inputs(MIXED_PROMPTS)
        report = prefill(one, inputs, spec)
        found = pictures(one.model, inputs)
        assert [picture.modality for picture in found] == ["image"] * 3 + ["video"] * 2
        for (sample, image), number in {(0, 0): 3, (0, 1): 0, (0, 2): 1, (1, 0): 2, (2, 0): 4}.items():
            group = [g for g, medium in enumerate(report.media) if medium.sample == sample][image]
            page = draw(report, found, sample=sample, image=image)
            fates = check_page(page, report, found[number], [group])
            assert sum(fates.values()) - fates["padding"] == (report.layout.row[group] >= 0).sum()
        whole = draw(report, found)
        assert whole.height > max(draw(report, found, image=image).height for image in range(3))

    def test_beams_show_the_images_of_their_prompt(self):
        one = tiny("qwen2_vl")
        inputs = one.inputs((("image", "image"), ("image",)))
        with vtc.compress(one.model, "uniform:5") as handle, torch.no_grad():
            one.model.generate(**inputs, max_new_tokens=1, num_beams=2)
        found = pictures(one.model, inputs)
        pages = [draw(handle.report, found, sample=sample).tobytes() for sample in range(4)]
        assert pages[0] == pages[1] != pages[2] == pages[3]

    def test_tiles_lie_as_on_their_image(self):
        """The panel without its seams is the picture that went in."""
        one, image = tiny("internvl"), photograph(180, 120)
        processor = processor_for(one)
        (picture,) = pictures(one.model, inputs_for(one, processor, image), processor)
        assert picture.tiles == (2, 3)
        size, boxes = arrange(picture, [(4, 4)] * 7)
        assert boxes[6][0] == boxes[6][1] == 0  # the whole stands in front
        lefts, tops = ([box[axis] for box in boxes[:6]] for axis in (0, 1))
        assert lefts[0] > boxes[6][2]
        assert lefts[:3] == lefts[3:] == sorted(lefts[:3])
        assert tops[:3] == [0] * 3
        assert min(tops[3:]) > boxes[0][3]
        assert max(box[2] for box in boxes) + 1 == size[0]

    def test_frames_lie_in_rows_and_small_cells_grow(self):
        frames = Picture((torch.zeros(3, 10, 20),) * 6, "video", tiles=None)
        _, boxes = arrange(frames, [(1, 2)] * 6)
        assert len({box[1] for box in boxes}) == 3  # 2 x 3 frames of 20 x 10 fill a square best
        (width, height), boxes = arrange(frames, [(100, 200)] * 6)
        assert max(width, height) > 2 * 576
        left, top, right, bottom = cell(boxes[5], (100, 200), 99, 199)
        assert (right, bottom) == boxes[5][2:]
        assert right - left >= 4 and bottom - top >= 4


class TestRefusals:
    def test_there_is_no_such_image(self):
        one = tiny("llava")
        inputs = one.inputs(((3,), ("image", 2)))
        report, found = prefill(one, inputs, "random:4"), pictures(one.model, inputs)
        draw(report, found, sample=1)
        with pytest.raises(errors.InputError, match=r"sample 0 of this report has no image; the samples \[1\] have"):
            draw(report, found)
        with pytest.raises(errors.InputError, match="sample 1 of this report has no image 1"):
            draw(report, found, sample=1, image=1)

    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
    def test_pictures_of_other_inputs(self, family):
        one = tiny(family)
        report = prefill(one, one.inputs(), "random:4")
        other = pictures(one.model, one.inputs((("image", "image"),)))
        with pytest.raises(errors.InputError, match="Make them from the inputs of the reported prefill"):
            draw(report, other)

    @pytest.mark.parametrize("family", families())
    def test_pixels_of_another_form(self, family):
        one = tiny(family)
        inputs = one.inputs((("image",),))
        name = next(name for name in inputs if name.startswith("pixel_values"))
        inputs[name] = inputs[name][..., :5][None]
        with pytest.raises(errors.InputError, match=r"pixels of shape \([0-9, ]+\) are no"):
            pictures(one.model, inputs)

    def test_an_adapter_that_says_nothing(self, monkeypatch):
        from vtc.adapter import Adapter
        from vtc.adapters._llama import LlamaAdapter

        monkeypatch.setattr(LlamaAdapter, "pictures", Adapter.pictures)
        one = tiny("llava")
        with pytest.raises(errors.UnsupportedModelError, match="adapter of 'llava' does not say how pixels"):
            pictures(one.model, one.inputs())


@pytest.mark.usefixtures("words")
class TestRun:
    @pytest.mark.parametrize("family", families())
    def test_a_checkpoint_of_every_family(self, family, tmp_path):
        """`vtc run --model` writes the picture that went in, and what became of it."""
        save_checkpoint(family, tmp_path)
        loaded, image = load(str(tmp_path), "cpu"), photograph(60, 150)
        result = self.run(loaded, image, tmp_path / "page.png")
        assert result.notes == result.report.notes
        assert result.overlay == str(tmp_path / "page.png")
        (picture,) = pictures(loaded.model, loaded.inputs(image, "what ?"), loaded.processor)
        with Image.open(result.overlay) as page:
            check_page(page, result.report, picture, range(len(result.report.media)))

    def test_what_cannot_be_drawn_loses_nothing_else(self, tmp_path, monkeypatch):
        one = tiny("llava")
        loaded, image = Loaded("tiny", one.model, processor_for(one)), photograph(60, 60)
        for path in (tmp_path / "no" / "folder.png", tmp_path / "page.unknown"):
            result = self.run(loaded, image, path)
            assert result.overlay is None
            assert result.to_dict()["notes"][-1].startswith("no picture: ")
            assert result.report.entering == (4,)
        monkeypatch.setattr(type(adapter_for(one.model)), "pictures", refuse)
        result = self.run(loaded, image, tmp_path / "page.png")
        assert result.notes[-1] == "no picture: of this one"
        assert not (tmp_path / "page.png").exists()

    def test_every_note_is_printed_once(self, tmp_path, capsys):
        one = tiny("llava")
        loaded, image = Loaded("tiny", one.model, processor_for(one)), photograph(60, 60)
        result = self.run(loaded, image, tmp_path / "no" / "folder.png", spec="random:99")
        show_run(result)
        printed = capsys.readouterr().out
        assert len(result.notes) == 2
        assert printed.count("note: ") == 2
        assert printed.count("everything is kept") == 1

    def run(self, loaded, image, path, spec="random:4"):
        return run(loaded, image, "what ?", spec, None, repeats=1, max_new_tokens=1, picture=path)


def refuse(self, inputs):
    raise errors.InputError("of this one")
