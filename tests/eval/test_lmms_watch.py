"""What stands in front of `generate` in lmms-eval runs; needs no lmms-eval."""

import pytest
import torch

from vtc.catalogue.registry import method_class
from vtc.errors import BudgetError, SpecError, UnsupportedModelError
from vtc.eval.lmms import timings
from vtc.eval.lmms.models import Compressed, _on_one_device, base_of
from vtc.eval.lmms.watch import RunFailed, Watch
from vtc.testing import tiny


@pytest.fixture
def case():
    return tiny("llava")


def generate(case, **options):
    with torch.inference_mode():
        return case.model.generate(**case.inputs(), do_sample=False, **{"max_new_tokens": 3, **options})


def test_answers_are_those_of_the_model_and_every_request_is_measured(case):
    plain = generate(case)
    watch = Watch(case.model)
    assert generate(case).equal(plain)
    watch.patch("uniform", 4)
    short = generate(case)
    dense, compressed = watch.requests
    assert dense["ttft_ms"] > 0
    assert dense["tpot_ms"] > 0
    assert dense["new_tokens"] == 3
    assert "entering_llm" not in dense
    assert compressed["entering_llm"] == compressed["after_last_cut"] == compressed["layer_average"] == 4
    assert compressed["before"] > 4
    assert compressed["selection_ms"] > 0
    assert compressed["kv_bytes"] < compressed["kv_bytes_dense"]
    generate(case, max_new_tokens=1)
    assert watch.requests[-1]["tpot_ms"] is None
    watch.close()
    assert generate(case).equal(plain)
    assert short.shape[0] == plain.shape[0]
    assert "generate" not in vars(case.model)
    assert not case.model._forward_hooks
    assert len(watch.requests) == 3


def test_an_error_in_our_hooks_is_no_exception_that_lmms_eval_could_swallow(case, monkeypatch):
    def fail(self, tokens):
        raise RuntimeError("boom")

    monkeypatch.setattr(method_class("fastervlm"), "filter", fail)
    watch = Watch(case.model)
    watch.patch("fastervlm", 4)
    with pytest.raises(RunFailed, match=r"request 1 with fastervlm:4: RuntimeError: boom") as caught:
        generate(case)
    assert not isinstance(caught.value, Exception)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert watch.requests == []


def test_a_call_with_pixels_that_was_not_compressed_fails(case):
    watch = Watch(case.model)
    watch.patch("uniform", 4)
    watch.handle.remove()  # as if a model class never reached our hooks
    with pytest.raises(RunFailed, match="was not compressed"):
        generate(case)


def test_a_refused_patch_leaves_the_dense_model(case):
    watch = Watch(case.model)
    watch.patch("uniform", 4)
    with pytest.raises((BudgetError, SpecError)):
        watch.patch("uniform", 0)
    assert watch.handle is None
    generate(case)
    assert "entering_llm" not in watch.requests[-1]


def test_times_leave_the_first_request_out_and_tokens_do_not():
    records = [
        {"ttft_ms": t, "tpot_ms": None, "before": 10, "entering_llm": n} for t, n in ((99.0, 1), (1.0, 2), (3.0, 6))
    ]
    whole = timings.columns([r | dict.fromkeys((*timings.TOKENS[2:], *timings.COSTS), 2) for r in records])
    assert timings.times([whole]) == {"ttft_ms": {"median": 2.0, "p20": 1.4, "p80": 2.6, "runs": 2}}
    assert timings.counts([whole])["tokens"] == {
        "before": 10, "entering_llm": 3, "after_last_cut": 2, "layer_average": 2,
    }  # fmt: skip
    assert timings.flat(whole)["ttft_ms"] == 2.0
    assert timings.flat(whole)["entering_llm"] == 3
    alone = timings.columns([{"ttft_ms": 99.0, "tpot_ms": None}])
    assert timings.flat(alone) == {"ttft_ms": 99.0}


def test_the_class_follows_from_the_model_type():
    assert base_of("llava_next") == "llava_hf"
    assert base_of("internvl") == "internvl_hf"
    with pytest.raises(UnsupportedModelError, match="smolvlm"):
        base_of("smolvlm")


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        ("1", {"device": "cpu"}, {"device": "cpu", "device_map": "cpu"}),
        ("1", {"device": "cuda:1"}, {"device": "cuda:1", "device_map": "cuda:1"}),
        # the classes choose the GPU of their process; llava_hf only if the map is empty
        ("2", {"device": "cuda"}, {"device": "cuda", "device_map": ""}),
        ("2", {"device": "cpu"}, {"device": "cpu", "device_map": "cpu"}),
        ("1", {"device": "cuda", "device_map": "auto"}, {"device": "cuda", "device_map": "auto"}),
    ],
)
def test_models_are_placed_on_one_device(monkeypatch, world, given, expected):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert _on_one_device(given) == expected


class Base:
    """What lmms-eval's classes give the mixin."""

    batch_size = 1

    def __init__(self, device, device_map):
        self.model = tiny("llava").model
        self.device = device

    def generate_until(self, requests):
        return ["" for _ in requests]  # as after an error that was swallowed before generate


class Wrapped(Compressed, Base):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "visionzap", "budget": 64}, "Did you mean 'visionzip'"),
        ({"method": "uniform", "budget": 0}, "at least 1"),
        ({"method": "uniform", "budget": 4, "positions": "left"}, "'original'"),
    ],
)
def test_mistakes_in_model_arguments_end_the_run(options, message):
    with pytest.raises(RunFailed, match=message):
        Wrapped(device="cpu", **options)


def test_a_spec_may_be_quoted_to_hold_commas():
    lm = Wrapped(device="cpu", method="'fastv(layer=2, query=mean)'", budget="50%")
    assert lm.watch.handle.spec == "fastv:0.5(query=mean)"


def test_answers_that_no_model_gave_end_the_run(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "lmms_eval.models.model_utils.gen_metrics", type("Stub", (), {"log_metrics": print})
    )
    with pytest.raises(RunFailed, match="2 requests were answered with 0 calls"):
        Wrapped(device="cpu").generate_until([1, 2])
