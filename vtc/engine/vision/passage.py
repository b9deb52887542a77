"""The site `tower[i]`: a stage between the attention and the MLP of a block, and a tower that is short from there on.

The block's own code runs twice (`vtc.engine.host.halves`): with its MLP silenced it ends where the stage acts, and
with its attention silenced it goes on from what the stage left.

Later blocks run on what is left. Their attention gets a mask where groups differ in length, and log(size) of merged
tokens where the stage asks for it. At the tower's exit every patch takes the features of the token it went into, so
that whatever comes behind sees stock shapes; which of them go on is decided by `vtc.engine.vision.encoder` from
`decision`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vtc.adapter import Attention, Halves
from vtc.engine.decide import run_step, stopwatch
from vtc.engine.host import masks, names
from vtc.engine.host.halves import is_silent, silence, silenced
from vtc.engine.host.override import Undo
from vtc.engine.plan import Step
from vtc.engine.vision.block import READERS, Block
from vtc.engine.vision.tiles import take_signal
from vtc.errors import SpecError, UnsupportedFeatureError
from vtc.indices import take
from vtc.signals import SIGNALS
from vtc.tokenmap import TokenMap
from vtc.tokens import Layout, Tokens

Targets = Callable[[Step, tuple[int, ...]], tuple[int, ...]]


@dataclass(eq=False)
class Passage:
    """One batch of tiles on its way through a tower.

    Rows of the sequence are [prefix, tokens the stages see, tokens hidden from them], padding last. Tokens are hidden
    where the host cuts them off behind the tower; they stay in the sequence as they are.

    Args:
        steps: the steps at each block, from `Plan.at`.
        prefix: [CLS] and register tokens in front of the patches.
        patches: patches of each tile.
        lengths: tokens of each group that the stages still see.
        layout: where they lie, prefix included (-1).
        targets: from a step and `lengths`, the tokens that stay in each group.
        rows: the tile of each group.
        device: of the features.
        visible: bool [tiles, patches]; None: all, one group per tile.
        implementation: the tower's attention implementation.
    """

    steps: Mapping[int, tuple[Step, ...]]
    prefix: int
    patches: int
    lengths: tuple[int, ...]
    layout: Layout | None
    targets: Targets
    rows: list[int]
    device: torch.device
    visible: Bool[Tensor, "T N"] | None = None
    implementation: str | None = None

    token_map: TokenMap | None = None  # from prefix and visible patches to what is left of them
    captured: dict[str, Tensor] = field(default_factory=dict)
    seconds: list[tuple[str, Any]] = field(default_factory=list)
    left: dict[int, tuple[int, ...]] = field(default_factory=dict)  # `lengths` behind each acting block
    _began: bool = False
    _checked: bool = False
    _proportional: bool = False
    _first: tuple[int, ...] = ()
    _order: Tensor | None = None
    _slot: Tensor | None = None
    _places: list[tuple[int, Tensor]] = field(default_factory=list)
    _bias: Tensor | None = None
    _carried: dict[Any, Tensor] = field(default_factory=dict)  # by the stage's `carry`

    @property
    def is_short(self) -> bool:
        """Whether tokens have left."""
        return self.token_map is not None

    @property
    def hidden(self) -> list[int]:
        """Hidden patches of each tile."""
        return [self.patches - n for n in self._per_tile(self._first or self.lengths)]

    def acts(self, index: int) -> bool:
        """Whether a step at block `index` has something to decide; known before the block runs."""
        return any(self._wanted(step) is not None for step in self.steps.get(index, ()))

    def enter(self, index: int, x: Float[Tensor, "T L D"]) -> Float[Tensor, "T L D"]:
        """The sequence in the order of rows that the stages need; called with what enters acting block `index`."""
        if self._began:
            return x
        self._began, self._first = True, self.lengths
        if self.visible is None:
            return x
        patches = (~self.visible).long().argsort(dim=1, stable=True) + self.prefix
        front = torch.arange(self.prefix, device=x.device).expand(len(patches), -1)
        self._order = torch.cat([front, patches], dim=1)
        self._places.append((index - 1, self._order.argsort(dim=1)))
        return take(x, self._order)

    def decide(self, index: int, x: Float[Tensor, "T L D"], attention: Attention) -> Float[Tensor, "T R D"]:
        """The sequence after the steps of block `index`."""
        local: TokenMap | None = None
        signals = self._signals(index, attention)
        for step in self.steps[index]:
            wanted = self._wanted(step)
            if wanted is None:
                continue
            with stopwatch(x.device) as watch:
                width = self.prefix + max(self.lengths)
                tokens = Tokens(
                    x[self.rows, :width] if self.visible is not None else x[:, :width],
                    self.lengths,
                    self.layout,
                    self._of_step(step, attention, signals, local),
                    num_prefix=self.prefix,
                    budget=wanted,
                )
                token_map = run_step(step, tokens)
                if step.stage.carry is not None:
                    self._carried[step.stage.carry] = step.stage.carry(tokens)
                if min(token_map.lengths) <= self.prefix:
                    raise SpecError(
                        f"{step} left no token of a group. A map at tower[i] lists the {self.prefix} prefix tokens "
                        "first and counts them, and keeps at least one token beside them."
                    )
                x = self._shorten(x, token_map.apply(tokens.x), token_map, step)
                local = token_map if local is None else local.then(token_map)
            self.seconds.append((str(step.stage.site), watch))
        self._places.append((index, self._expansion()))
        self.left[index] = self.lengths
        return x

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """The attention mask of a shortened sequence, in the place of the host's, which hides nothing."""
        if self._bias is None:
            return None
        if self.implementation not in masks.ADDITIVE:
            raise UnsupportedFeatureError(
                f"the tokens left of these images differ in number or carry log(size), which needs a mask that "
                f"{self.implementation!r} does not take. Load the model with attn_implementation='sdpa'."
            )
        return self._bias.to(dtype)

    def check_mask(self, given: Any) -> None:
        """Refuse towers that mask patches; asks the device once per passage.

        Raises:
            UnsupportedFeatureError: some patches are padding.
        """
        if self._checked or not self._began or given is None:
            return
        self._checked = True
        shown = given == 0 if given.is_floating_point() else given.bool()
        if not bool(shown.all()):
            raise UnsupportedFeatureError(
                "some images are padded inside the vision tower, and padding must not be merged with patches. "
                "Let the processor cut images into full tiles, or use a method at tower_out."
            )

    def expand(self, x: Tensor, index: int) -> Tensor:
        """[T, R, ...] as it left block `index` with a row for every host token again: each reads where it went."""
        place = next((place for block, place in reversed(self._places) if block <= index), None)
        if place is None:
            return x
        return x.gather(1, place.view(*place.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:]))

    def _wanted(self, step: Step) -> tuple[int, ...] | None:
        """Tokens that stay in each group; None where the step changes nothing."""
        wanted = self.targets(step, self.lengths)
        covers_all = all(k >= n for k, n in zip(wanted, self.lengths, strict=True))
        return None if covers_all and "adaptive" not in step.method.tags else wanted

    def _shorten(self, x: Tensor, values: Tensor, token_map: TokenMap, step: Step) -> Tensor:
        """The sequence in which `values` replace the rows that the stages see."""
        slots = _slots(token_map)
        self._slot = slots if self._slot is None else slots.gather(1, self._slot)
        self.token_map = token_map if self.token_map is None else self.token_map.then(token_map)
        self._proportional = self._proportional or step.stage.weighs
        before = self._ends(self.lengths, hidden=False)
        self.lengths = tuple(n - self.prefix for n in token_map.lengths)
        if self.layout is not None:
            self.layout = self.layout.take(token_map.anchor[:, : values.shape[1]])
        if self.visible is not None:
            whole = x.new_zeros(x.shape[0], values.shape[1], x.shape[2])
            whole[:, : self.prefix] = x[:, : self.prefix]
            whole[self.rows] = values
            index = self._joined(values.shape[1], before).to(x.device)
            values = take(torch.cat([whole, x], dim=1), index).masked_fill((index < 0)[..., None], 0)
        self._bias = self._key_bias(values)
        return values

    def _joined(self, width: int, before: list[int]) -> Int[Tensor, "T R"]:
        """Rows of [what is left (`width` places), the sequence before]: what is left, then the hidden tokens."""
        after, hidden = self._ends(self.lengths, hidden=False), self.hidden
        total = max(a + h for a, h in zip(after, hidden, strict=True))
        place = torch.arange(total)
        ends, old, count = (torch.tensor(part)[:, None] for part in (after, before, hidden))
        index = torch.where(place < ends, place, width + old + place - ends)
        return index.masked_fill(place >= ends + count, -1)

    def _key_bias(self, x: Tensor) -> Tensor | None:
        """What is added to the logits of each key [T, 1, 1, R]; None: nothing."""
        ends = self._ends(self.lengths)
        is_ragged = len(set(ends)) > 1
        if not is_ragged and not self._proportional:
            return None
        bias = x.new_zeros(x.shape[:2], dtype=torch.float32)
        if self._proportional:
            assert self.token_map is not None
            sizes = self.token_map.sizes()[:, : self.prefix + max(self.lengths)]
            bias[self.rows, : sizes.shape[1]] = sizes.clamp(min=1).log()
        if is_ragged:
            inside = torch.arange(x.shape[1], device=x.device) < torch.tensor(ends, device=x.device)[:, None]
            bias = bias.masked_fill(~inside, torch.finfo(x.dtype).min)
        return bias[:, None, None]

    def _expansion(self) -> Int[Tensor, "T L"]:
        """The row of every host token."""
        assert self.token_map is not None and self._slot is not None
        # a slot's features are read at its anchor, whatever went there by the way
        width = self.prefix + max(self.lengths)
        anchor = self.token_map.anchor[:, :width]
        slots = torch.arange(width, device=anchor.device).expand_as(anchor)
        extra = torch.where(anchor < 0, self._slot.shape[1], anchor)
        place = nn.functional.pad(self._slot, (0, 1)).scatter(1, extra, slots)[:, :-1]
        if self._order is None:
            return place
        device, total = place.device, self.prefix + self.patches
        seen, left = (
            torch.tensor(self._ends(lengths, hidden=False), device=device)[:, None]
            for lengths in (self._first, self.lengths)
        )
        index = torch.arange(total, device=device)
        rows = torch.where(index < seen, 0, index - seen + left)
        inside = nn.functional.pad(place, (0, total - place.shape[1]))
        rows[self.rows] = torch.where(index < seen[self.rows], inside, rows[self.rows])
        return torch.empty_like(rows).scatter(1, self._order, rows)

    def _block(self, attention: Attention) -> Block:
        """The block that is running, as readers of signals see it."""
        bias = self._bias if self._proportional else None
        width = self.prefix + max(self.lengths)
        return Block(attention, self.captured, self.rows, width, self._ends(self.lengths), bias, self._sizes)

    def _signals(self, index: int, attention: Attention) -> dict[str, Tensor]:
        """What the stages at block `index` read of its attention, for the rows that they see."""
        block = self._block(attention)
        needed = {signal.name for step in self.steps[index] for signal in step.stage.signals}
        found = {name: READERS[name](block) for name in sorted(needed) if SIGNALS[name].of}
        self.captured.clear()
        return found

    def _of_step(
        self, step: Step, attention: Attention, signals: Mapping[str, Tensor], local: TokenMap | None
    ) -> dict[str, Tensor]:
        """The signals of one stage: those of the attention in `signals`, the others as they are by now."""
        found = {}
        if step.stage.carry in self._carried:
            found["carried"] = self._carried[step.stage.carry]
        for signal in step.stage.signals:
            if signal.name not in signals:
                value = READERS[signal.name](self._block(attention))
            elif local is None:
                value = signals[signal.name]
            else:
                value = take_signal(signals[signal.name], local.anchor)
            found[signal.name] = value if SIGNALS[signal.name].prefix else value[:, self.prefix :]
        return found

    def _sizes(self) -> Float[Tensor, "G N"]:
        width = self.prefix + max(self.lengths)
        if self.token_map is None:
            return torch.ones(len(self.lengths), width, device=self.device)
        return self.token_map.sizes()[:, :width]

    def _per_tile(self, lengths: Sequence[int]) -> list[int]:
        """`lengths` of the groups for each tile; 0 where a tile has no group."""
        if self.visible is None:
            return list(lengths)
        counts = [0] * self.visible.shape[0]
        for row, n in zip(self.rows, lengths, strict=True):
            counts[row] = n
        return counts

    def _ends(self, lengths: Sequence[int], hidden: bool = True) -> list[int]:
        """Rows of each tile: the prefix, `lengths`, and the hidden tokens."""
        counts = self._per_tile(lengths)
        more = self.hidden if hidden else [0] * len(counts)
        return [self.prefix + n + h for n, h in zip(counts, more, strict=True)]


def attach(
    tower: nn.Module,
    blocks: Sequence[nn.Module],
    parts: tuple[Callable[[Any], Halves], Callable[[Any], Attention]],
    steps: Mapping[int, tuple[Step, ...]],
    running: Callable[[], Passage | None],
    begin: Callable[[Tensor], Passage | None],
    undo: Undo,
) -> None:
    """Let `tower` run `steps` at their blocks; what takes it off again goes to `undo`.

    Args:
        tower: the module whose output holds `last_hidden_state` and, maybe, `hidden_states`.
        blocks: its pre-norm blocks, in order.
        parts: from a block, its halves and its self-attention.
        running: the passage of the running call, None before `begin` made one and outside of any.
        begin: makes it from what enters the first acting block [T, L, D]; None: leave this call alone.
    """
    halves_of, attention_of = parts
    for index in range(min(steps), len(blocks)):
        block = blocks[index]
        halves = halves_of(block)
        place = list(inspect.signature(halves.attention.forward).parameters).index(halves.mask)
        undo.override(halves.attention, functools.partial(_masked_attention, halves, place, running))
        if index in steps:
            attention = attention_of(block)
            start = begin if index == min(steps) else None
            undo.override(halves.mlp, functools.partial(silenced, halves.mlp, False))
            run = functools.partial(_run_block, index, halves, attention, running, start)
            undo.override(block, run)
            needed = {part for step in steps[index] for one in step.stage.signals for part in SIGNALS[one.name].of}
            for part, module in (("query", attention.query), ("key", attention.key)):
                if part in needed:
                    undo.after(module, functools.partial(_record, part, running, attention.project is not None))
    undo.after(tower, functools.partial(_restore, running))


def _run_block(
    index: int,
    halves: Halves,
    attention: Attention,
    running: Callable[[], Passage | None],
    begin: Callable[[Tensor], Passage | None] | None,
    original: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    passage = running()
    if begin is not None:
        passage = begin(hidden)
    if passage is None or not passage.acts(index):
        return original(hidden, *args, **kwargs)
    with silence(halves.mlp):
        middle = original(passage.enter(index, hidden), *args, **kwargs)
    middle = passage.decide(index, middle, attention)
    with silence(halves.attention):
        return original(middle, *args, **kwargs)


def _masked_attention(
    halves: Halves,
    place: int,
    running: Callable[[], Passage | None],
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if is_silent(halves.attention):
        return silenced(halves.attention, halves.returns_tuple, original, *args, **kwargs)
    passage = running()
    if passage is not None:
        given = args[place] if len(args) > place else kwargs.get(halves.mask)
        passage.check_mask(given)
        if passage.is_short:
            mask = passage.mask(names.hidden_argument(args, kwargs).dtype)
            if mask is not None and halves.mask == "key_padding_mask":
                mask = mask[:, 0, 0]
            if len(args) > place:
                args = (*args[:place], mask, *args[place + 1 :])
            else:
                kwargs[halves.mask] = mask
    return original(*args, **kwargs)


def _record(
    name: str, running: Callable[[], Passage | None], enters: bool, module: nn.Module, args: Any, output: Any
) -> None:
    """Hook that notes what leaves `module`, or what enters it."""
    passage = running()
    if passage is not None:
        passage.captured[name] = args[0] if enters else output


def _restore(running: Callable[[], Passage | None], module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of the tower: every hidden state on the full grid."""
    passage = running()
    if passage is None or not passage.is_short:
        return None
    if isinstance(output, tuple):
        raise UnsupportedFeatureError(
            "the vision tower returned a tuple, whose parts have no names. Call the encoder with return_dict=True."
        )
    states = getattr(output, names.HIDDEN_STATES, None)
    if states is not None:
        expanded = tuple(None if state is None else passage.expand(state, i - 1) for i, state in enumerate(states))
        setattr(output, names.HIDDEN_STATES, expanded)
    return names.with_last_hidden(output, passage.expand(getattr(output, names.LAST_HIDDEN), max(passage.steps)))


def _slots(token_map: TokenMap) -> Int[Tensor, "G N"]:
    """For each token the slot it mainly went into; a dropped one that of the last token before it that stayed."""
    slot = token_map.sources()
    place = torch.arange(slot.shape[1], device=slot.device)
    last = torch.where(slot < 0, -1, place).cummax(dim=1).values
    return slot.gather(1, last.clamp(min=0)).clamp(min=0)
