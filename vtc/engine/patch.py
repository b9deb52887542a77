"""What a user holds: `patch` a model, `compress` it for a block, read the report, take it off again."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from vtc.adapter import Adapter, adapter_for, unwrap
from vtc.companion import ClipCompanion
from vtc.engine.host import flash
from vtc.engine.host.compiled import refuse_compiled
from vtc.engine.host.override import Undo
from vtc.engine.llm import door, exit, layers
from vtc.engine.llm import unmerge as unmerging
from vtc.engine.llm.evict import held_after_prefill
from vtc.engine.llm.forward import Forward, cut_forward
from vtc.engine.plan import Plan
from vtc.engine.planning import make_plan
from vtc.engine.vision import encoder
from vtc.errors import StateError, UnsupportedModelError
from vtc.report import Report, cache_bytes, lengths_by_layer, prefill_flops
from vtc.spec import format_spec, parse
from vtc.stages import Method
from vtc.tokens import Budget

#: the active handle of each patched model; weak, so that a forgotten model goes away with its handle
_ACTIVE: "weakref.WeakKeyDictionary[nn.Module, Handle]" = weakref.WeakKeyDictionary()

#: the spec of each encoder that is patched by itself (`vtc.engine.vision.alone`), by its tower
PATCHED_ENCODERS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def patch(
    model: nn.Module,
    spec: str | Method | Iterable[Method],
    budget: int | float | str | Budget | None = None,
    *,
    positions: str = "auto",
    size_bias: bool | None = None,
    companion: ClipCompanion | None = None,
    unmerge: bool | None = None,
) -> "Handle":
    """Compress the visual tokens of a stock model from now on.

    Args:
        model: a loaded `...ForConditionalGeneration` of a supported family.
        spec: a spec string ("visionzip:64", "fastervlm:128 + dart@2:64"), a method, or several methods.
        budget: tokens (int), share kept (float) or a Budget, for methods that have none of their own.
        positions: "original" (position ids of the uncompressed prompt), "compact" (gaps of tokens dropped before the
            LLM are closed; tokens dropped inside it keep theirs), "renumber" (gaps are closed at every drop), or
            "auto": what the first method's paper uses.
        size_bias: add log(size) of merged tokens to their attention logits in the LLM, from the layer on where they
            were merged. None: what the methods' papers do.
        companion: CLIP's text tower and projections, for methods that read CLIP's joint space.
        unmerge: virtual token unmerging: in attention, a merged token stands at the place of every token it was made
            of; saves no KV cache. None: what the methods' papers do.

    Returns:
        A handle with `.report` and `.remove()`.

    Raises:
        UnsupportedModelError: no adapter, offloaded or meta weights, compiled model.
        SpecError, BudgetError, SignalUnavailableError: the spec does not fit the model.
        StateError: the model is already patched.

    Nothing has changed when an error is raised.
    """
    _check_model(model)
    model = unwrap(model)
    active = _ACTIVE.get(model)
    if active is not None:
        raise StateError(
            f"this model is already patched with {active.spec!r}. Call handle.remove() first, "
            "or use `with vtc.compress(model, ...)` to replace the patch for a block."
        )
    handle = Handle(model, parse(spec, budget), positions, size_bias, companion, unmerge)
    handle._install()
    return handle


@contextlib.contextmanager
def compress(
    model: nn.Module,
    spec: str | Method | Iterable[Method],
    budget: int | float | str | Budget | None = None,
    *,
    positions: str = "auto",
    size_bias: bool | None = None,
    companion: ClipCompanion | None = None,
    unmerge: bool | None = None,
) -> "Iterator[Handle]":
    """`patch` for the length of a `with` block; an outer patch of the same model is put back at its end."""
    _check_model(model)
    model = unwrap(model)
    handle = Handle(model, parse(spec, budget), positions, size_bias, companion, unmerge)
    outer = _ACTIVE.get(model)
    if outer is not None:
        outer._uninstall()
    try:
        handle._install()
        yield handle
    finally:
        handle.remove()
        if outer is not None:
            outer._install()


class Handle:
    """A patch on a model. Made by `patch` or `compress`."""

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        positions: str,
        size_bias: bool | None,
        companion: ClipCompanion | None = None,
        unmerge: bool | None = None,
    ) -> None:
        _check_model(model)
        self._adapter: Adapter = adapter_for(model)
        self._plan: Plan = make_plan(self._adapter, methods, positions, size_bias, companion, unmerge)
        self._model = weakref.ref(model)
        self._undo = Undo()
        self._last: Callable[[], Report] | None = None

    @property
    def spec(self) -> str:
        """The methods as a spec string."""
        return format_spec(self._plan.methods)

    @property
    def positions(self) -> str:
        """The position policy in force: "original", "compact" or "renumber"."""
        return self._plan.positions

    @property
    def active(self) -> bool:
        """Whether the model is compressed right now."""
        return bool(self._undo)

    @property
    def report(self) -> Report:
        """Figures of the last prefill with images.

        Raises:
            StateError: there was none yet.
        """
        if self._last is None:
            raise StateError("no report yet: the patched model has not seen an image. Call model.generate(...) first.")
        return self._last()

    def remove(self) -> None:
        """Take the patch off; the model is what it was before. Calling it twice does nothing."""
        self._uninstall()

    def __repr__(self) -> str:
        return f"<vtc.Handle {self.spec!r}, {'active' if self.active else 'removed'}>"

    def _install(self) -> None:
        model = self._model()
        if model is None:
            raise StateError("the patched model no longer exists.")
        try:
            encoder.attach(self._adapter, self._plan, self._undo)
            layers.attach(self._adapter, self._plan, self._undo)
            flash.attach(self._adapter, cut_forward, self._undo)
            if self._plan.unmerge:
                unmerging.attach(self._adapter, self._undo)
            door.attach(self._adapter, self._plan, self._undo)
            exit.attach(self._adapter, self._plan, self._record, self._undo)
        except BaseException:
            self._uninstall()
            raise
        _ACTIVE[model] = self

    def _uninstall(self) -> None:
        self._undo.take_off()
        model = self._model()
        if model is not None and _ACTIVE.get(model) is self:
            del _ACTIVE[model]

    def _record(self, state: Forward) -> None:
        """Keep what a report needs; the figures are computed when somebody asks."""
        visual, prompt = state.visual, state.prompt
        assert visual is not None and prompt is not None and prompt.layout is not None
        layout, batch, length = prompt.layout, prompt.batch, prompt.length
        cuts, seconds = dict(state.visual_lengths), list(state.seconds)
        awake = dict(state.awake)

        def report() -> Report:
            config = self._adapter.text_config
            dense = visual.per_sample(batch, [sum(images) for images in visual.origin])
            per_layer = lengths_by_layer(cuts, len(self._adapter.layers))
            text = tuple(length - n for n in dense)
            size = next(self._adapter.language_model.parameters()).element_size()
            everything = (tuple(dense),) * len(per_layer)
            virtual = self._plan.unmerge  # attention and caches see every token at its place
            kv_tokens = everything if virtual else held_after_prefill(self._plan, per_layer)
            kept = cache_bytes(config, kv_tokens, text, size)
            spent: dict[str, float] = {}
            for site, watch in seconds:
                spent[site] = spent.get(site, 0.0) + watch.seconds * 1e3
            return Report(
                spec=self.spec,
                family=self._adapter.family,
                visual_tokens=tuple(dense),
                entering=per_layer[0],
                per_layer=per_layer,
                text_tokens=text,
                selection_ms=spent,
                kv_tokens=kv_tokens,
                flops_dense=prefill_flops(config, everything, text),
                flops=prefill_flops(config, per_layer, text, awake, everything if virtual else None),
                kv_bytes_dense=sum(cache_bytes(config, everything, text, size)),
                kv_bytes=sum(kept),
                kv_bytes_per_layer=kept,
                notes=_notes(self._plan, visual.origin),
                token_map=visual.token_map,
                samples=visual.sample,
                layout=layout,
            )

        self._last = report


def _notes(plan: Plan, origin: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    notes = []
    for step in plan.steps:
        longest = max(n for images in origin for n in images)
        if step.budget.tokens is not None and step.budget.per == "image" and step.budget.tokens >= longest:
            notes.append(f"{step}: budget {step.budget.tokens} covers all {longest} tokens, everything is kept")
    return tuple(notes)


def handle_around(part: nn.Module) -> Handle | None:
    """The active handle of the model that `part` belongs to."""
    return next((handle for model, handle in _ACTIVE.items() if any(part is m for m in model.modules())), None)


def _check_model(model: Any) -> None:
    """Refuse what cannot be patched, before anything changes.

    Raises:
        UnsupportedModelError: no module, or weights that are not there.
        UnsupportedFeatureError: a compiled model.
        StateError: its encoder is patched by itself.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"patch needs a loaded model, not {type(model).__name__}. "
            "Load it with AutoModelForImageTextToText.from_pretrained(...)."
        )
    refuse_compiled(model)
    alone = next((PATCHED_ENCODERS[module] for module in model.modules() if module in PATCHED_ENCODERS), None)
    if alone is not None:
        raise StateError(
            f"the encoder of this model is already patched by itself with {alone!r}. Call that handle's remove() first."
        )
    meta = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"parameter {meta!r} is on the meta device (offloaded or not loaded), so its layers cannot be read. "
            "Load the model on one device: from_pretrained(..., device_map='cpu' or 'cuda')."
        )
