"""Site `pixels`: the tower runs on a smaller image, so that fewer tokens come into being.

A stage decides on the patches of the image, and what stays must be a grid: rows x columns of anchors. The tower's image
is scaled to that many tokens, with the host's own interpolation of position embeddings, and each feature takes the
place of its anchor on the stock grid, so that packing and placeholder counts of the host never see another shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pixel_unshuffle

from vtc.adapter import Encoder, Resize
from vtc.engine.decide import budgets, run_step, stopwatch
from vtc.engine.host import names
from vtc.engine.host.override import Undo
from vtc.engine.plan import Plan, Step
from vtc.engine.readers import Readers
from vtc.engine.vision.call import EncodeState, state_of
from vtc.errors import UnsupportedFeatureError
from vtc.tokens import Layout, Tokens

READERS: Readers[Callable[[Resize, Tensor], Tensor]] = Readers()


def attach(plan: Plan, encoder: Encoder, undo: Undo) -> None:
    """Hook the tower of `encoder` where a `pixels` stage acts; what takes the hook off again goes to `undo`."""
    if plan.at("pixels"):
        hook = functools.partial(_enter_tower, plan, encoder)
        undo.before(encoder.tower, hook, with_kwargs=True)


def _enter_tower(plan: Plan, encoder: Encoder, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the tower."""
    state = state_of(encoder)
    if state is None:
        return None
    if isinstance(encoder.resize, str):
        raise UnsupportedFeatureError(
            f"{plan.at('pixels')[0]} cannot shrink {encoder.modality}s of this model: {encoder.resize}."
        )
    image = args[0] if args else kwargs[names.PIXELS]
    (step,) = plan.at("pixels")
    with stopwatch(image.device) as watch:
        height, width = _decide(step, encoder.resize, state, image)
        if state.decided is not None:
            shape = (height * encoder.resize.token, width * encoder.resize.token)
            # smoothed, as image processors scale
            small = interpolate(image.float(), shape, mode="bicubic", antialias=True, align_corners=False)
            small = small.to(image.dtype)
            args, kwargs = ((small, *args[1:]), kwargs) if args else (args, {**kwargs, names.PIXELS: small})
            if encoder.resize.flag is not None:
                kwargs = {**kwargs, encoder.resize.flag: True}
    state.seconds = watch.seconds
    return args, kwargs


def _decide(step: Step, resize: Resize, state: EncodeState, image: Tensor) -> tuple[int, int]:
    """Height and width, in tokens, of the grid to run on; `state.decided` stays None where it is the stock grid."""
    side = resize.token
    full = image.shape[-2] // side, image.shape[-1] // side
    layout = Layout.grid(*full, groups=len(image), device=image.device)
    patches = pixel_unshuffle(image[..., : full[0] * side, : full[1] * side], side).flatten(2).transpose(1, 2)
    lengths = (full[0] * full[1],) * len(image)
    wanted = budgets(step.budget, tuple((n,) for n in lengths), lengths, layout)
    signals = {signal.name: READERS[signal.name](resize, image) for signal in step.stage.signals}
    token_map = run_step(step, Tokens(patches, lengths, layout, signals, budget=wanted))
    anchors = token_map.anchor[:, : token_map.lengths[0]]
    # one wait for the device: which grid was chosen
    grid = len(layout.row[0][anchors[0]].unique()), len(layout.col[0][anchors[0]].unique())
    if len(set(token_map.lengths)) > 1 or grid[0] * grid[1] != anchors.shape[1] or bool((anchors != anchors[:1]).any()):
        raise UnsupportedFeatureError(
            f"{step} keeps tokens that are no grid, or not the same in all images. A stage at `pixels` returns rows x "
            "columns of anchors that the images of one call share."
        )
    if grid != full:
        state.decided = token_map
    return grid


@READERS.reads("square_grid")
def _square_grid(resize: Resize, image: Tensor) -> Tensor:
    return torch.full((len(image),), resize.square, device=image.device)
