"""What a user holds: patch a model or an encoder, compress it for a block, read the report, take it off again."""

import contextlib
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from torch import nn

from vtc.adapter import adapter_for, unwrap
from vtc.companion import ClipCompanion
from vtc.encoder_report import EncoderReport
from vtc.encoders import ImageEncoder, encoder_for
from vtc.engine import reports
from vtc.engine.host import contract, flash
from vtc.engine.host.compiled import refuse_compiled
from vtc.engine.host.override import Undo
from vtc.engine.llm import door, exit, layers
from vtc.engine.llm import unmerge as unmerging
from vtc.engine.llm.forward import Forward, cut_forward
from vtc.engine.planning import make_plan
from vtc.engine.vision import alone, encoder
from vtc.engine.vision.passage import Passage
from vtc.errors import StateError, UnsupportedModelError
from vtc.report import Report
from vtc.spec import format_spec, parse
from vtc.stages import Method
from vtc.tokens import Budget, Layout

R = TypeVar("R")
P = ParamSpec("P")
H = TypeVar("H", bound="Patch[Any]")


class Patch(ABC, Generic[R]):
    """What was changed on a model: taken off again by `remove()`, and what it did is in `report`."""

    #: words of its messages: what is patched, what patches it for a block, what makes a first report
    _kind: ClassVar[str]
    _block: ClassVar[str]
    _call: ClassVar[str]

    def __init__(self, holder: nn.Module, methods: tuple[Method, ...]) -> None:
        self._holder = weakref.ref(holder)
        self._methods = methods
        self._undo = Undo()
        self._last: Callable[[], R] | None = None

    @property
    def spec(self) -> str:
        """The methods as a spec string."""
        return format_spec(self._methods)

    @property
    def active(self) -> bool:
        """Whether the model is compressed right now."""
        return bool(self._undo)

    @property
    def report(self) -> R:
        """Figures of the last call with images.

        Raises:
            StateError: there was none yet.
        """
        if self._last is None:
            raise StateError(f"no report yet: the patched {self._kind} has not seen an image. {self._call}")
        return self._last()

    def remove(self) -> None:
        """Take the patch off; the model is what it was before. Calling it twice does nothing."""
        self._undo.take_off()
        holder = self._holder()
        if holder is not None and self._active() is self:
            del _ACTIVE[holder]

    def __repr__(self) -> str:
        return f"<vtc.{type(self).__name__} {self.spec!r}, {'active' if self.active else 'removed'}>"

    def _active(self) -> "Patch[Any] | None":
        """The active patch of the same model or encoder."""
        holder = self._holder()
        return None if holder is None else active_on(holder)

    def _install(self) -> None:
        holder = self._holder()
        if holder is None:
            raise StateError("the patched model no longer exists.")
        try:
            self._attach(self._undo)
        except BaseException:
            self.remove()
            raise
        _ACTIVE[holder] = weakref.ref(self)

    @abstractmethod
    def _attach(self, undo: Undo) -> None:
        """Change the model; what takes it off again goes to `undo`, step by step."""


#: the active patch of each model or encoder; weak, since the patched methods keep it alive as long as the model lives
_ACTIVE: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Patch[Any]]]" = weakref.WeakKeyDictionary()


def active_on(holder: nn.Module) -> Patch[Any] | None:
    """The active patch of a model or an encoder."""
    reference = _ACTIVE.get(holder)
    return None if reference is None else reference()


class Handle(Patch[Report]):
    """A patch on a model. Made by `vtc.patch` or `vtc.compress`."""

    _kind, _block, _call = "model", "compress", "Call model.generate(...) first."

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        positions: str,
        size_bias: bool | None,
        companion: ClipCompanion | None = None,
        unmerge: bool | None = None,
    ) -> None:
        super().__init__(model, methods)
        self._adapter = adapter_for(model)
        self._plan = make_plan(self._adapter, methods, positions, size_bias, companion, unmerge)

    @property
    def positions(self) -> str:
        """The position policy in force: "original", "compact" or "renumber"."""
        return self._plan.positions

    def _attach(self, undo: Undo) -> None:
        adapter, plan = self._adapter, self._plan
        encoder.attach(adapter, plan, undo)
        layers.attach(adapter, plan, undo)
        flash.attach(adapter, cut_forward, undo)
        if plan.unmerge:
            unmerging.attach(adapter, undo)
        door.attach(adapter, plan, undo)
        exit.attach(adapter, plan, self._record, undo)

    def _record(self, state: Forward) -> None:
        self._last = reports.of_forward(self._adapter, self.spec, state)


class EncoderHandle(Patch[EncoderReport]):
    """A patch on an image encoder. Made by `vtc.patch_encoder` or `vtc.compress_encoder`."""

    _kind, _block, _call = "encoder", "compress_encoder", "Call it first."

    def __init__(self, encoder: ImageEncoder, methods: tuple[Method, ...]) -> None:
        super().__init__(encoder.tower, methods)
        self.encoder = encoder
        self._steps = alone.steps_of(encoder, methods)

    def _attach(self, undo: Undo) -> None:
        alone.attach(self.encoder, self._steps, self.spec, self._record, undo)

    def _record(self, passage: Passage, layout: Layout | None) -> None:
        self._last = reports.of_passage(self.encoder, self.spec, passage, layout)


def _from_now_on(name: str, prepare: Callable[P, H]) -> Callable[P, H]:
    """The public function `name` that installs what `prepare` makes."""

    @functools.wraps(prepare)
    def call(*args: P.args, **kwargs: P.kwargs) -> H:
        handle = prepare(*args, **kwargs)
        active = handle._active()
        if active is not None:
            raise StateError(
                f"this {handle._kind} is already patched with {active.spec!r}. Call handle.remove() first, or use "
                f"`with vtc.{handle._block}(model, ...)` to replace the patch for a block."
            )
        handle._install()
        return handle

    call.__name__ = call.__qualname__ = name
    return call


def _for_a_block(name: str, prepare: Callable[P, H], doc: str) -> Callable[P, AbstractContextManager[H]]:
    """The public function `name` that installs what `prepare` makes for the length of a `with` block."""

    @contextlib.contextmanager
    @functools.wraps(prepare)
    def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[H]:
        handle = prepare(*args, **kwargs)
        outer = handle._active()
        if outer is not None:
            outer.remove()
        try:
            handle._install()
            yield handle
        finally:
            handle.remove()
            if outer is not None:
                outer._install()

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


def _handle(
    model: nn.Module,
    spec: str | Method | Iterable[Method],
    budget: int | float | str | Budget | None = None,
    *,
    positions: str = "auto",
    size_bias: bool | None = None,
    companion: ClipCompanion | None = None,
    unmerge: bool | None = None,
) -> Handle:
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
    _check_module(model, "patch", "Load it with AutoModelForImageTextToText.from_pretrained(...).")
    model = unwrap(model)
    inside = next((one for one in map(active_on, model.modules()) if isinstance(one, EncoderHandle)), None)
    if inside is not None:
        raise StateError(
            f"the encoder of this model is already patched by itself with {inside.spec!r}. Call that handle's remove() "
            "first."
        )
    meta = _on_meta(model)
    if meta is not None:
        raise UnsupportedModelError(
            f"parameter {meta!r} is on the meta device (offloaded or not loaded), so its layers cannot be read. "
            "Load the model on one device: from_pretrained(..., device_map='cpu' or 'cuda')."
        )
    return Handle(model, parse(spec, budget), positions, size_bias, companion, unmerge)


def _encoder_handle(
    model: nn.Module, spec: str | Method | Iterable[Method], budget: int | float | str | Budget | None = None
) -> EncoderHandle:
    """Let an image encoder run on fewer tokens from now on; everything that it returns keeps its shape.

    Args:
        model: a CLIP, SigLIP, DINOv2, ViT or DeiT of transformers, a VisionTransformer of timm or open_clip, or a model
            that holds one (`CLIPModel`, `...ForImageClassification`).
        spec: a spec string ("tome:0.5", "tome(r=8)"), a method, or several methods; they act inside the tower only.
        budget: patches that are left behind the last block (int), share kept (float) or a Budget, for methods that have
            none of their own. Prefix tokens always stay and are not counted.

    Returns:
        A handle with `.report` and `.remove()`.

    Raises:
        UnsupportedModelError: no such encoder, meta weights, a version of transformers that was not tested.
        UnsupportedFeatureError: a method with stages outside the tower, a compiled model, log(size) with an attention
            that takes no mask.
        SpecError, BudgetError, SignalUnavailableError: the spec does not fit the encoder.
        StateError: the encoder, or the model around it, is already patched.

    Nothing has changed when an error is raised.
    """
    _check_module(
        model,
        "patch_encoder",
        "Load it, e.g. with AutoModel.from_pretrained(...), timm.create_model(...) or open_clip.create_model(...).",
    )
    found = encoder_for(model)
    if type(found.tower).__module__.startswith("transformers."):
        contract.check_version()
    meta = _on_meta(found.tower)
    if meta is not None:
        raise UnsupportedModelError(f"parameter {meta!r} of {found.name} is on the meta device: load its weights.")
    around = _around(found.tower)
    if around is not None:
        raise StateError(
            f"this encoder is part of a model that is patched with {around.spec!r}. Call that handle's remove() first."
        )
    return EncoderHandle(found, parse(spec, budget))


def _check_module(model: Any, name: str, load: str) -> None:
    """Refuse what is no loaded model, or was compiled before.

    Raises:
        UnsupportedModelError, UnsupportedFeatureError: it is.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{name} needs a loaded model, not {type(model).__name__}. {load}")
    refuse_compiled(model)


def _on_meta(model: nn.Module) -> str | None:
    """The name of a parameter whose weights are not there."""
    return next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)


def _around(part: nn.Module) -> Handle | None:
    """The active patch of the model that `part` belongs to."""
    found = (active_on(model) for model in _ACTIVE if any(part is module for module in model.modules()))
    return next((one for one in found if isinstance(one, Handle)), None)


patch = _from_now_on("patch", _handle)
compress = _for_a_block(
    "compress", _handle, "`patch` for the length of a `with` block; an outer patch of the model is put back at its end."
)
patch_encoder = _from_now_on("patch_encoder", _encoder_handle)
compress_encoder = _for_a_block(
    "compress_encoder",
    _encoder_handle,
    "`patch_encoder` for the length of a `with` block; an outer patch of the encoder is put back at its end.",
)
