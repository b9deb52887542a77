"""Pictures of reports: what went into a model comes back as a picture, and is dark where the report says so."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vtc.eval.loading import Loaded
from vtc.picture import pictures
from vtc.testing import families, tiny
from vtc.testing.processors import processor_for

VIDEO = [family for family in families() if tiny(family).has_video]
#: what the stock processors make of a picture: a square out of its middle, or all of it in another shape
CROPPED = ("llava", "video_llava")
#: mean difference of colours, where hosts scale with another filter than the test
CLOSE = 0.03


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
