"""What is declared in `vtc.signals` and who reads it: neither without the other."""

import pytest
import torch

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.catalogue.capabilities import describe_adapter
from vtc.catalogue.tables import signals_table
from vtc.engine.llm import carried
from vtc.engine.llm import signals as llm_signals
from vtc.engine.plan import source_layer
from vtc.engine.readers import Readers
from vtc.engine.vision import block, pixels
from vtc.engine.vision import signals as vision_signals
from vtc.signals import SIGNALS, Kind
from vtc.stages import SITES, Signal, Site, Stage, nothing
from vtc.testing import GivenStages, tiny
from vtc.testing.conformance import AXES, draw_tokens

#: site -> the readers of what is made there
READERS = {
    "pixels": pixels.READERS,
    "tower": block.READERS,
    "tower_out": vision_signals.READERS,
    "llm_in": llm_signals.READERS,
    "layer": llm_signals.READERS,
}
#: of what is made at one site and read behind the encoder
CARRIED = {**vision_signals.READERS, **carried.READERS}


def without_the_other(signals):
    """Sites of signals that nobody reads there, and readers of what is no signal."""
    unread = set()
    for name, kind in signals.items():
        for site in kind.sites:
            behind = kind.carried and site in ("llm_in", "layer")
            if name not in (CARRIED if behind else READERS[site]):
                unread.add((name, site))
    return unread, {name for readers in (*READERS.values(), CARRIED) for name in readers} - set(signals)


def test_every_signal_has_a_reader_at_each_of_its_sites_and_every_reader_an_entry():
    assert without_the_other(SIGNALS) == (set(), set())


def test_what_is_missing_is_found():
    motion = Kind("B N", "how far each token moved", ("tower_out", "layer"), carried=True)
    assert without_the_other({**SIGNALS, "motion": motion}) == ({("motion", "tower_out"), ("motion", "layer")}, set())
    less = {name: kind for name, kind in SIGNALS.items() if name not in ("clip_text_embeds", "sizes")}
    assert without_the_other(less) == (set(), {"clip_text_embeds", "sizes"})


def test_one_function_reads_a_signal():
    readers = Readers()
    readers.reads("keys", "queries")(len)
    with pytest.raises(AssertionError, match="keys"):
        readers.reads("keys")(max)


@pytest.mark.parametrize("name", SIGNALS)
def test_an_entry_fits_together(name):
    kind = SIGNALS[name]
    assert kind.sites
    assert set(kind.sites) < set(SITES)
    assert kind.axes[0] == "B"
    assert all(axis.isdigit() or axis in {**AXES, "B": 0, "N": 0} for axis in kind.axes)
    assert set(kind.comes_with) <= set(SIGNALS)
    assert kind.layer is None or "layer" in kind.sites
    assert kind.block is None or "tower_out" in kind.sites
    assert not kind.carried or {"llm_in", "layer"} <= set(kind.sites)


@pytest.mark.parametrize("name", ["no_such_signal", "text", "carried"])
def test_unknown_names_are_refused(name):
    with pytest.raises(errors.SpecError, match=f"signal '{name}' is unknown"):
        Signal(name)


def test_the_layer_that_makes_a_signal():
    made = {name: source_layer(5, Signal(name, -1)) for name in ("keys", "mlp_input", "layer_keys", "position")}
    assert made == {"keys": 3, "mlp_input": 3, "layer_keys": 5, "position": None}


@pytest.mark.parametrize(
    ("name", "query", "key"),
    [
        ("keys", 0, 1),
        ("text_queries", 1, 0),
        ("text_attention", 1, 1),
        ("text_gravity", 0, 0),
        ("sequence_row", 0, 0),
        ("layer_keys", 0, 0),
    ],
)
def test_a_layer_is_hooked_for_what_is_read_of_it(name, query, key):
    model = tiny("llava").model
    attention = adapter_for(model).layer_attention(1)

    def hooks():
        return [len(module._forward_hooks) for module in (attention.query, attention.key)]

    before = hooks()
    stage = Stage(Site("layer", 2), nothing, signals=(Signal(name),))
    with vtc.compress(model, GivenStages(given=(stage,), budget=vtc.Budget(tokens=4))):
        assert [n - m for n, m in zip(hooks(), before, strict=True)] == [query, key]
    assert hooks() == before


class TestANewSignal:
    """An entry and a reader are all that a stage, its refusals, its conformance and the tables need."""

    @pytest.fixture(autouse=True)
    def pull(self, monkeypatch):
        entry = Kind(
            "B T N",
            "twice the attention of the text",
            ("layer",),
            of=("query", "key", "rotation", "logits"),
            layer="before",
            comes_with=("text_mask",),
        )
        monkeypatch.setitem(SIGNALS, "pull", entry)
        monkeypatch.setitem(llm_signals.READERS, "pull", lambda read: read.tokens(2 * read.source.attention(read.text)))

    @staticmethod
    def stage(*names, site=None, seen=None):
        def keep(tokens):
            if seen is not None:
                seen.append(tokens)
            return torch.arange(max(tokens.budget)).expand(len(tokens.lengths), -1)

        return Stage(site or Site("layer", 2), keep, signals=tuple(map(Signal, names)), pool="sample")

    def test_is_read(self):
        llava, seen = tiny("llava"), []
        stage = self.stage("pull", "text_attention", seen=seen)
        with vtc.compress(llava.model, GivenStages(given=(stage,), budget=vtc.Budget(tokens=4))), torch.no_grad():
            llava.model(**llava.inputs())
        (tokens,) = seen
        assert torch.equal(tokens.signal("pull"), 2 * tokens.signal("text_attention"))
        assert "text_mask" in tokens.signals

    def test_is_refused_where_nobody_reads_it(self):
        given = GivenStages(given=(self.stage("pull", site=Site("llm_in")),), budget=vtc.Budget(tokens=4))
        with pytest.raises(errors.SignalUnavailableError, match="does not capture at llm_in"):
            vtc.patch(tiny("llava").model, given)

    def test_is_drawn_and_listed(self):
        drawn = draw_tokens(self.stage("pull"), (5, 3), 2)
        assert drawn.signal("pull").shape == (2, AXES["T"], 5)
        assert drawn.signal("text_mask").any()
        assert "pull" in describe_adapter(adapter_for(tiny("llava").model))["sites"]["layer"]["signals"]
        assert "| `pull` | `[B, T, N]` | layer | twice the attention of the text" in signals_table()
