"""The bytes that each layer's cache takes are those that the report counts, for one method of each kind."""

import pytest
import torch

import vtc
from vtc.engine.host import names
from vtc.testing import tiny
from vtc.testing.tiny import PROMPTS

KINDS = {
    "before the LLM": "uniform:5",
    "behind the tower": "visionzip:6",
    "inside the tower": "tome:6",
    "inside the LLM": "fastv@2:4",
    "in several steps": "pyramiddrop@2|3|4:4",
    "down to nothing": "todre:5(probe=3, tau=1.0)",
    "frozen": "shortv(layers=1|2)",
    "parked": "lvlm-csp:6",
    "evicted": "promptdistill@3:4(truncate_cache=-1)",
    "unmerged": "dymu:6",
    "composed": "uniform:9 + fastv@2:4",
}


@pytest.fixture(scope="module")
def deep():
    return tiny("llava", layers=6)


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_bytes_of_each_layer(deep, spec):
    inputs = deep.inputs(PROMPTS[:1])
    with torch.no_grad(), vtc.compress(deep.model, spec) as handle:
        cache = names.cache_of(deep.model(**inputs, use_cache=True))
    report = handle.report
    held = tuple(sum(part.numel() * part.element_size() for part in (e.keys, e.values)) for e in cache.layers)
    assert held == report.kv_bytes_per_layer
    assert sum(held) == report.kv_bytes
    text = report.text_tokens[0]
    assert tuple(entries.keys.shape[2] - text for entries in cache.layers) == tuple(n for (n,) in report.kv_tokens)
    assert ("KV cache by layer" in str(report)) == (len(set(held)) > 1)
