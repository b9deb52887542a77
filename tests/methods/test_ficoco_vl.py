"""FiCoCo-VL shares the tokens that go between the tower and the decoder."""

import pytest
import torch

import vtc
from vtc.testing import tiny


@pytest.mark.parametrize(("slug", "between"), [("ficoco-v", None), ("ficoco-l", 16), ("ficoco-vl", 10)])
def test_counts_along_the_way(slug, between):
    one = tiny("llava")
    place = {"layer": 2} if slug != "ficoco-v" else {}
    with vtc.compress(one.model, vtc.create(slug, budget=4, **place)) as handle, torch.no_grad():
        one.model(**one.inputs())
        report = handle.report
    assert report.after_last_cut == (4,)
    assert report.entering == (between or 4,)
    if between:
        third = between + (4 - between) // 2
        assert [layer[0] for layer in report.per_layer] == [between, between, third, 4]


def test_share_is_what_leaves_in_the_tower():
    tower, llm = vtc.create("ficoco-vl", layer=2, share=0.25).stages()
    stages = tower.at_depth(23).repeated(23)
    assert stages[-1].schedule(576, 64) == 576 - 128
    parts = llm.at_depth(32).repeated(32)
    assert parts[0].schedule(576, 64) == 448 - 384 // 30
    assert parts[-1].schedule(576, 64) == 64
    with pytest.raises(vtc.VTCError, match="share"):
        vtc.create("ficoco-vl", share=1.0)
