"""The probe on a config of each family, without weights."""

import pytest

import vtc
from vtc.eval.doctor import diagnose
from vtc.testing import families, tiny


@pytest.mark.parametrize("family", families())
def test_config_only_model(family, tmp_path):
    tiny(family).model.config.save_pretrained(tmp_path)
    found = diagnose(str(tmp_path))
    assert found.family == family
    assert set(found.runs) | set(found.refused) == set(vtc.methods())
    assert {"random", "uniform", "pool", "divprune"} <= set(found.runs)
    assert all(len(reason) > 40 for reason in found.refused.values())
    assert "image" in found.parts
