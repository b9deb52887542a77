"""`vtc models` says what the adapters and the checks say, and `vtc oracle` fails when a model differs."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vtc
from vtc.adapter import adapter_for
from vtc.catalogue.capabilities import REFUSED, capabilities, describe_adapter, method_families
from vtc.cli import app
from vtc.engine.llm import rows
from vtc.signals import signals_at
from vtc.stages import SITES
from vtc.testing import families, tiny
from vtc.testing.oracle_table import LIMIT, SPECS, worst_difference


@pytest.fixture(scope="module")
def entries():
    return {entry["family"]: entry for entry in capabilities()}


def test_every_family_with_everything(entries):
    assert tuple(entries) == families()
    for family, entry in entries.items():
        assert entry["checkpoints"], family
        assert set(entry["sites"]) == set(SITES)
        for name, site in entry["sites"].items():
            if site["available"]:
                assert set(site["signals"]) | set(site["missing"]) == set(signals_at(name))
                assert all(len(reason) > 20 for reason in site["missing"].values())
            else:
                assert len(site["reason"]) > 20
        assert entry["positions"]["original"] is None
        assert set(REFUSED) <= set(entry["refused"])
        assert json.loads(json.dumps(entry)) == entry


def test_what_differs_between_families(entries):
    assert entries["llava"]["modalities"] == ["image"]
    assert entries["qwen2_vl"]["modalities"] == ["image", "video"]
    assert "images and videos in one prompt" in entries["video_llava"]["generation"]
    assert "cls_attention" in entries["llava"]["sites"]["tower_out"]["signals"]
    assert "no [CLS]" in entries["gemma3"]["sites"]["tower_out"]["missing"]["cls_attention"]
    assert entries["qwen3_vl"]["lowest_layer"]["layer"] == 2
    assert "M-RoPE" in entries["qwen2_5_vl"]["positions"]["compact"]
    refusing = [family for family, entry in entries.items() if "assisted decoding" in entry["refused"]]
    assert refusing == ["paligemma"]
    assert [f for f, e in entries.items() if "prompt and answer longer than a sliding window" in e["refused"]] == [
        "gemma3"
    ]


@pytest.mark.parametrize("family", families())
def test_a_model_without_weights_is_described_alike(family, entries):
    model = tiny(family).model
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert describe_adapter(adapter_for(empty)) == entries[family]


class TestFamiliesOfMethods:
    @pytest.mark.parametrize("slug", vtc.methods())
    def test_every_family_is_accounted_for(self, slug):
        found = method_families(slug)
        refused = found["families_refused"]
        assert sorted([*found["families"], *found["families_with_companion"], *refused]) == list(families())
        assert all(len(reason) > 40 for reason in refused.values())

    def test_what_is_known_of_some(self):
        assert method_families("fastv")["families"] == list(families())
        fastervlm = method_families("fastervlm")
        assert "llava" in fastervlm["families"]
        assert "no [CLS]" in fastervlm["families_refused"]["gemma3"]
        # refused in the four layers of the models above, so that depth matters
        assert "llava" in method_families("ficoco-l")["families"]

    def test_methods_that_need_clip_say_on_which_towers(self):
        found = method_families("cdpruner")
        assert found["families"] == []
        assert found["families_with_companion"] == ["llava", "llava_next", "llava_next_video", "video_llava"]
        assert "no CLIP tower" in found["families_refused"]["gemma3"]

    def test_it_is_what_a_patch_says_of_a_model_with_weights(self):
        for slug in ("visionzip", "tome", "globalcom2"):
            found = method_families(slug)
            for family in ("llava", "internvl", "qwen2_vl"):
                model = tiny(family).model
                if family in found["families"]:
                    vtc.patch(model, vtc.create(slug, budget=0.5)).remove()
                else:
                    with pytest.raises(vtc.VTCError) as caught:
                        vtc.patch(model, vtc.create(slug, budget=0.5))
                    assert str(caught.value) == found["families_refused"][family]

    def test_only_on_request(self):
        assert "families" not in vtc.describe("cdpruner")
        assert vtc.describe("cdpruner", families=True)["families_with_companion"]


def test_models_as_json(entries):
    done = CliRunner().invoke(app, ["models", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == list(entries.values())


class TestOracle:
    def test_one_family(self):
        worst = worst_difference("llava", specs=SPECS[-1:], attention=("sdpa",))
        assert worst.cases == 2
        assert 0 < worst.difference < LIMIT / 10

    @pytest.mark.full
    @pytest.mark.parametrize("family", families())
    def test_every_family(self, family):
        assert worst_difference(family).difference < LIMIT / 10

    def test_a_wrong_model_is_found(self, monkeypatch):
        """An engine that keeps one column too few differs by far more than the limit."""
        compact = rows.compact
        monkeypatch.setattr(rows, "compact", lambda keep, counts: compact(keep, counts).roll(1, 1))
        worst = worst_difference("llava", specs=SPECS[:1], attention=("sdpa",))
        assert worst.difference > 100 * LIMIT

    @pytest.mark.parametrize(("limit", "code"), [("1e-4", 0), ("1e-12", 1)])
    def test_the_command(self, limit, code):
        done = CliRunner().invoke(app, ["oracle", "llava", "--json", "--limit", limit])
        assert done.exit_code == code
        data = json.loads(done.stdout)
        assert data["passed"] == (code == 0)
        assert [row["family"] for row in data["families"]] == ["llava"]
        assert data["worst"] == data["families"][0]["difference"]

    def test_unknown_families(self):
        done = CliRunner().invoke(app, ["oracle", "lava"])
        assert isinstance(done.exception, vtc.errors.UnsupportedModelError)
