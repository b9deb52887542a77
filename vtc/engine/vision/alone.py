"""Encoders by themselves: `tower[i]` methods on a ViT without an LLM.

The blocks run on fewer tokens (`vtc.engine.vision.passage`). Behind the last one every patch takes the features of the
token it went into, so that norms, pooling, projections and heads see stock shapes; so do the hidden states that the
encoder returns. One call of the encoder's entry is one run, and its state lives in a context variable for that long.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from vtc.adapter import Attention
from vtc.encoder_report import EncoderReport
from vtc.encoders import ImageEncoder, encoder_for, methods_by_themselves
from vtc.engine.decide import budgets
from vtc.engine.host import contract, names
from vtc.engine.host.compiled import refuse_compiled
from vtc.engine.host.override import Undo
from vtc.engine.patch import PATCHED_ENCODERS, handle_around
from vtc.engine.plan import CAPTURED, Step
from vtc.engine.vision import passage as tower
from vtc.engine.vision.tower import without_prefix
from vtc.errors import SignalUnavailableError, SpecError, StateError, UnsupportedFeatureError, UnsupportedModelError
from vtc.flops import vit_block
from vtc.spec import format_spec, parse
from vtc.stages import Method
from vtc.tokenmap import TokenMap
from vtc.tokens import Budget, Layout


def patch_encoder(
    model: nn.Module, spec: str | Method | Iterable[Method], budget: int | float | str | Budget | None = None
) -> "EncoderHandle":
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
    handle = _make(model, spec, budget)
    active = PATCHED_ENCODERS.get(handle.encoder.tower)
    if active is not None:
        raise StateError(
            f"this encoder is already patched with {active!r}. Call handle.remove() first, or use "
            "`with vtc.compress_encoder(model, ...)` to replace the patch for a block."
        )
    handle._install()
    return handle


@contextlib.contextmanager
def compress_encoder(
    model: nn.Module, spec: str | Method | Iterable[Method], budget: int | float | str | Budget | None = None
) -> "Iterator[EncoderHandle]":
    """`patch_encoder` for the length of a `with` block; an outer patch of the encoder is put back at its end."""
    handle = _make(model, spec, budget)
    outer = _HANDLES.get(handle.encoder.tower, lambda: None)()
    if outer is not None:
        outer.remove()
    try:
        handle._install()
        yield handle
    finally:
        handle.remove()
        if outer is not None:
            outer._install()


@dataclass(eq=False)
class _Passage(tower.Passage):
    """A passage that remembers how many patches each acting block left."""

    left: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def decide(self, index: int, x: Float[Tensor, "T L D"], attention: Attention) -> Float[Tensor, "T R D"]:
        x = super().decide(index, x, attention)
        self.left[index] = self.lengths
        return x


@dataclass(eq=False)
class _Run:
    """One call of an encoder's entry."""

    handle: "EncoderHandle"
    passage: _Passage | None = None


_RUN: ContextVar[_Run | None] = ContextVar("vtc_encoder_run", default=None)

#: height and width of the patches that were embedded last
_GRID: ContextVar[tuple[int, int] | None] = ContextVar("vtc_encoder_grid", default=None)

#: the active handle of each patched tower; the tower's own methods keep it alive
_HANDLES: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[EncoderHandle]]" = weakref.WeakKeyDictionary()


class EncoderHandle:
    """A patch on an image encoder. Made by `patch_encoder` or `compress_encoder`."""

    def __init__(self, encoder: ImageEncoder, methods: tuple[Method, ...]) -> None:
        self.encoder = encoder
        self._methods = methods
        self._steps = _plan(encoder, methods)
        self._undo = Undo()
        self._last: Callable[[], EncoderReport] | None = None

    @property
    def spec(self) -> str:
        """The methods as a spec string."""
        return format_spec(self._methods)

    @property
    def active(self) -> bool:
        """Whether the encoder is compressed right now."""
        return bool(self._undo)

    @property
    def report(self) -> EncoderReport:
        """Figures of the last batch of images.

        Raises:
            StateError: there was none yet.
        """
        if self._last is None:
            raise StateError("no report yet: the patched encoder has not seen an image. Call it first.")
        return self._last()

    def remove(self) -> None:
        """Take the patch off; the encoder is what it was before. Calling it twice does nothing."""
        self._undo.take_off()
        reference = _HANDLES.get(self.encoder.tower)
        if reference is not None and reference() is self:
            del _HANDLES[self.encoder.tower], PATCHED_ENCODERS[self.encoder.tower]

    def __repr__(self) -> str:
        return f"<vtc.EncoderHandle {self.spec!r}, {'active' if self.active else 'removed'}>"

    def _install(self) -> None:
        encoder, undo = self.encoder, self._undo
        try:
            if self._steps:
                parts = encoder.halves, encoder.attention_of
                tower.attach(encoder.tower, encoder.blocks, parts, self._steps, self._running, self._begin, undo)
            undo.override(encoder.blocks[-1], self._leave)
            undo.after(encoder.patches, _note_grid)
            for name in encoder.bypasses:
                undo.override(encoder.tower, functools.partial(self._refuse, name), name)
            signature = inspect.signature(getattr(encoder.tower, encoder.entry))
            undo.override(encoder.tower, functools.partial(self._enter, signature), encoder.entry)
        except BaseException:
            self.remove()
            raise
        _HANDLES[encoder.tower] = weakref.ref(self)
        PATCHED_ENCODERS[encoder.tower] = self.spec

    def _running(self) -> _Passage | None:
        run = _RUN.get()
        return None if run is None or run.handle is not self else run.passage

    def _enter(self, signature: inspect.Signature, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The entry of the encoder."""
        given = signature.bind_partial(*args, **kwargs).arguments
        for name in self.encoder.masks:
            if given.get(name) is not None and given[name] is not False:
                raise UnsupportedFeatureError(
                    f"{name} hides patches of {self.encoder.name} from each other, and hidden patches must not be "
                    f"merged with others. Leave {name} out, or call handle.remove()."
                )
        run = _Run(self)
        token = _RUN.set(run)
        try:
            output = original(*args, **kwargs)
        finally:
            _RUN.reset(token)
        if run.passage is not None:
            self._note(run.passage)
            if run.passage.is_short:
                _expand_states(output, run.passage)
        return output

    def _begin(self, hidden: Float[Tensor, "B L D"]) -> _Passage:
        """The passage of the running call, made from what enters the first acting block."""
        encoder, run = self.encoder, _RUN.get()
        if encoder.checkpoints():
            raise UnsupportedFeatureError(
                "gradient checkpointing runs blocks twice, the second time without the state of this call. "
                "Turn it off while the encoder is patched."
            )
        if run is None or run.handle is not self:
            raise StateError(
                f"the blocks of {encoder.name} were run by something else than its {encoder.entry}(), where nothing "
                "puts what they return on the full grid again. Call the model itself, or handle.remove() first."
            )
        images, patches = hidden.shape[0], hidden.shape[1] - encoder.num_prefix
        layout = _layout(patches, images, hidden.device)
        prefixed = layout
        if layout is not None:
            prefixed = layout.map(lambda part: pad(part, (encoder.num_prefix, 0), value=-1))

        def targets(step: Step, current: tuple[int, ...]) -> tuple[int, ...]:
            origin = ((patches,),) * images
            return budgets(step.budget, origin, current, layout, range(images), step.stage.schedule)

        run.passage = _Passage(
            self._steps,
            encoder.num_prefix,
            patches,
            (patches,) * images,
            prefixed,
            targets,
            list(range(images)),
            hidden.device,
            implementation=encoder.implementation(),
        )
        return run.passage

    def _leave(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The last block: what leaves it is on the full grid."""
        x, passage = original(*args, **kwargs), self._running()
        return x if passage is None or not passage.is_short else passage.expand(x, len(self.encoder.blocks) - 1)

    def _refuse(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeatureError(
            f"{name} hands out tokens between the blocks, of which each has another number while {self.encoder.name} "
            f"is compressed by {self.spec!r}. Use the output of the encoder, or call handle.remove()."
        )

    def _note(self, passage: _Passage) -> None:
        """Keep what a report needs; the figures are computed when somebody asks."""
        encoder, spec = self.encoder, self.spec
        images, patches, prefix = len(passage.rows), passage.patches, passage.prefix
        left, seconds, token_map = dict(passage.left), list(passage.seconds), passage.token_map
        layout = _layout(patches, images, passage.device)

        def report() -> EncoderReport:
            per_block, current = [], (patches,) * images
            for index in range(len(encoder.blocks)):
                current = left.get(index, current)
                per_block.append(current)
            spent: dict[str, float] = {}
            for site, watch in seconds:
                spent[site] = spent.get(site, 0.0) + watch.seconds * 1e3
            stock = [(prefix + patches,) * images] * len(encoder.blocks)
            counted = [tuple(prefix + n for n in lengths) for lengths in per_block]
            identity = TokenMap.identity((patches,) * images, passage.device)
            return EncoderReport(
                spec=spec,
                encoder=encoder.name,
                patches=(patches,) * images,
                prefix=prefix,
                per_block=tuple(per_block),
                selection_ms=spent,
                flops_dense=_flops(encoder, stock, stock[0]),
                flops=_flops(encoder, counted, stock[0]),
                token_map=identity if token_map is None else without_prefix(token_map, prefix).raster(),
                layout=layout,
            )

        self._last = report


def _make(
    model: nn.Module, spec: str | Method | Iterable[Method], budget: int | float | str | Budget | None
) -> EncoderHandle:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"patch_encoder needs a loaded model, not {type(model).__name__}. Load it, e.g. with "
            "AutoModel.from_pretrained(...), timm.create_model(...) or open_clip.create_model(...)."
        )
    refuse_compiled(model)
    encoder = encoder_for(model)
    if type(encoder.tower).__module__.startswith("transformers."):
        contract.check_version()
    meta = next((name for name, p in encoder.tower.named_parameters() if p.device.type == "meta"), None)
    if meta is not None:
        raise UnsupportedModelError(f"parameter {meta!r} of {encoder.name} is on the meta device: load its weights.")
    around = handle_around(encoder.tower)
    if around is not None:
        raise StateError(
            f"this encoder is part of a model that is patched with {around.spec!r}. Call that handle's remove() first."
        )
    return EncoderHandle(encoder, parse(spec, budget))


def _plan(encoder: ImageEncoder, methods: tuple[Method, ...]) -> dict[int, tuple[Step, ...]]:
    """The steps at each block; everything that can be refused is refused here."""
    depth = len(encoder.blocks)
    steps: dict[int, tuple[Step, ...]] = {}
    for method in methods:
        for general in method.stages():
            if general.site.name != "tower":
                raise UnsupportedFeatureError(
                    f"method {method.slug!r} acts at {general.site}, and an encoder by itself has nothing but its "
                    f"blocks, tower[0]..tower[{depth - 1}]. Methods that act there and nowhere else: "
                    f"{', '.join(methods_by_themselves())}."
                )
            for stage in general.at_depth(depth).repeated(depth):
                step = Step(method, stage, method.budget_for(stage))
                index = stage.site.index
                if not isinstance(index, int) or not 0 <= index < depth:
                    raise SpecError(f"{step}: {encoder.name} has the blocks 0..{depth - 1} (0-based).")
                _check(encoder, step)
                steps[index] = (*steps.get(index, ()), step)
    return dict(sorted(steps.items()))


def _check(encoder: ImageEncoder, step: Step) -> None:
    for signal in step.stage.signals:
        reason = None
        if signal.name not in CAPTURED["tower"]:
            reason = "the engine does not capture it inside a tower"
        elif signal.name == "cls_attention" and not encoder.has_cls:
            reason = "it has no [CLS] token"
        elif signal.name == "queries" and encoder.num_prefix and not encoder.has_cls:
            reason = "methods take the first prefix token for [CLS], and here it is a register"
        if reason is not None:
            raise SignalUnavailableError(
                f"{step} reads {signal.name!r}, which {encoder.name} cannot give: {reason}. "
                "See the options of the method for another score."
            )
    implementation = encoder.implementation()
    if step.stage.proportional and implementation not in tower.MASKED:
        raise UnsupportedFeatureError(
            f"{step} adds log(size) to the attention logits, for which {implementation!r} has no argument. "
            "Load the model with attn_implementation='sdpa', or turn the option off."
        )


def _note_grid(module: nn.Module, args: Any, output: Tensor) -> None:
    """Hook of the convolution that makes the patches."""
    _GRID.set((output.shape[-2], output.shape[-1]))


def _layout(patches: int, images: int, device: torch.device) -> Layout | None:
    """The grid of the patches; None where some were left out (patch dropout)."""
    grid = _GRID.get()
    if grid is None or grid[0] * grid[1] != patches:
        return None
    return Layout.grid(*grid, groups=images, device=device)


def _expand_states(output: Any, passage: _Passage) -> None:
    """Put the hidden states between the blocks on the full grid; the last one is there already."""
    if isinstance(output, tuple) and any(isinstance(part, tuple) for part in output):
        raise UnsupportedFeatureError(
            "the encoder returned its hidden states in a tuple, whose parts have no names. Call it with "
            "return_dict=True."
        )
    states = getattr(output, names.HIDDEN_STATES, None)
    if states is None:
        return
    last = len(states) - 1
    expanded = (state if state is None or i == last else passage.expand(state, i - 1) for i, state in enumerate(states))
    setattr(output, names.HIDDEN_STATES, tuple(expanded))


def _flops(encoder: ImageEncoder, lengths: list[tuple[int, ...]], entering: tuple[int, ...]) -> int:
    """FLOPs of the blocks, summed over the images, where block i leaves `lengths[i]` tokens of each."""
    total = 0
    for block, leaving in zip(encoder.blocks, lengths, strict=True):
        halves, attention = encoder.halves(block), encoder.attention_of(block)
        weights = [sum(p.numel() for p in half.parameters() if p.dim() == 2) for half in (halves.attention, halves.mlp)]
        width = attention.num_heads * attention.head_dim
        total += sum(vit_block(n, m, weights[0], weights[1], width) for n, m in zip(entering, leaving, strict=True))
        entering = leaving
    return total
