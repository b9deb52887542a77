"""Encoders by themselves: `tower[i]` methods on a ViT without an LLM.

The blocks run on fewer tokens (`vtc.engine.vision.passage`). Behind the last one every patch takes the features of the
token it went into, so that norms, pooling, projections and heads see stock shapes; so do the hidden states that the
encoder returns. One call of the encoder's entry is one run, and its state lives in a context variable for that long.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from vtc.encoders import ImageEncoder, methods_by_themselves
from vtc.engine.decide import budgets
from vtc.engine.host import masks, names
from vtc.engine.host.override import Undo
from vtc.engine.plan import Step
from vtc.engine.vision import passage as tower
from vtc.engine.vision.passage import Passage
from vtc.errors import SignalUnavailableError, SpecError, StateError, UnsupportedFeatureError
from vtc.signals import SIGNALS
from vtc.stages import Method
from vtc.tokens import Layout

#: called at the end of a run with its passage and the grid of its patches (None: they are no grid)
Record = Callable[[Passage, Layout | None], None]


@dataclass(eq=False)
class _Run:
    """One call of an encoder's entry."""

    owner: "_Alone"
    passage: Passage | None = None
    layout: Layout | None = None  # of the patches


_RUN: ContextVar[_Run | None] = ContextVar("vtc_encoder_run", default=None)

#: height and width of the patches that were embedded last
_GRID: ContextVar[tuple[int, int] | None] = ContextVar("vtc_encoder_grid", default=None)


def attach(encoder: ImageEncoder, steps: Mapping[int, tuple[Step, ...]], spec: str, record: Record, undo: Undo) -> None:
    """Let `encoder` run `steps` at their blocks; what takes it off again goes to `undo`."""
    alone = _Alone(encoder, steps, spec, record)
    if steps:
        parts = encoder.halves, encoder.attention_of
        tower.attach(encoder.tower, encoder.blocks, parts, steps, alone.running, alone.begin, undo)
    undo.override(encoder.blocks[-1], alone.leave)
    undo.after(encoder.patches, _note_grid)
    for name in encoder.bypasses:
        undo.override(encoder.tower, functools.partial(alone.refuse, name), name)
    signature = inspect.signature(getattr(encoder.tower, encoder.entry))
    undo.override(encoder.tower, functools.partial(alone.enter, signature), encoder.entry)


def steps_of(encoder: ImageEncoder, methods: tuple[Method, ...]) -> dict[int, tuple[Step, ...]]:
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


@dataclass(frozen=True, eq=False)
class _Alone:
    """What stands in the places of an encoder's methods while it is patched."""

    encoder: ImageEncoder
    steps: Mapping[int, tuple[Step, ...]]
    spec: str
    record: Record

    def running(self) -> Passage | None:
        run = _RUN.get()
        return None if run is None or run.owner is not self else run.passage

    def enter(self, signature: inspect.Signature, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
            self.record(run.passage, run.layout)
            if run.passage.is_short:
                _expand_states(output, run.passage)
        return output

    def begin(self, hidden: Float[Tensor, "B L D"]) -> Passage:
        """The passage of the running call, made from what enters the first acting block."""
        encoder, run = self.encoder, _RUN.get()
        if encoder.checkpoints():
            raise UnsupportedFeatureError(
                "gradient checkpointing runs blocks twice, the second time without the state of this call. "
                "Turn it off while the encoder is patched."
            )
        if run is None or run.owner is not self:
            raise StateError(
                f"the blocks of {encoder.name} were run by something else than its {encoder.entry}(), where nothing "
                "puts what they return on the full grid again. Call the model itself, or handle.remove() first."
            )
        images, patches = hidden.shape[0], hidden.shape[1] - encoder.num_prefix
        layout = prefixed = run.layout = _layout(patches, images, hidden.device)
        if layout is not None:
            prefixed = layout.map(lambda part: pad(part, (encoder.num_prefix, 0), value=-1))

        def targets(step: Step, current: tuple[int, ...]) -> tuple[int, ...]:
            origin = ((patches,),) * images
            return budgets(step.budget, origin, current, layout, range(images), step.stage.count)

        run.passage = Passage(
            self.steps,
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

    def leave(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The last block: what leaves it is on the full grid."""
        x, passage = original(*args, **kwargs), self.running()
        return x if passage is None or not passage.is_short else passage.expand(x, len(self.encoder.blocks) - 1)

    def refuse(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeatureError(
            f"{name} hands out tokens between the blocks, of which each has another number while {self.encoder.name} "
            f"is compressed by {self.spec!r}. Use the output of the encoder, or call handle.remove()."
        )


def _check(encoder: ImageEncoder, step: Step) -> None:
    for signal in step.stage.signals:
        reason = None
        kind = SIGNALS[signal.name]
        if "tower" not in kind.sites:
            reason = "the engine does not capture it inside a tower"
        elif "cls" in kind.of and not encoder.has_cls:
            reason = "it has no [CLS] token"
        elif signal.name == "queries" and encoder.num_prefix and not encoder.has_cls:
            reason = "methods take the first prefix token for [CLS], and here it is a register"
        if reason is not None:
            raise SignalUnavailableError(
                f"{step} reads {signal.name!r}, which {encoder.name} cannot give: {reason}. "
                "See the options of the method for another score."
            )
    implementation = encoder.implementation()
    if step.stage.weighs and implementation not in masks.ADDITIVE:
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


def _expand_states(output: Any, passage: Passage) -> None:
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
