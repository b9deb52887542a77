"""The new tokens of one call, as they come to the language model, and what is refused about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vtc.engine.host import cache as host
from vtc.engine.llm.held import Held, Memory
from vtc.errors import InputError, StateError
from vtc.tokens import Layout, Medium


@dataclass(frozen=True, eq=False)
class Prompt:
    """What does not change while a call runs; columns are counted among its new tokens.

    Args:
        batch, length, device: of the embeddings.
        cache: the KV cache of the host; None: there is none.
        memory: what earlier calls left on it; None: everything.
        past: logical columns before this call.
        held: entries of the reference layer before this call.
        ids: int64 [B, S]; None: embeddings were given.
        valid: bool [B, S], the prompt's 2-D mask over the new columns; None: all are.
        candidates: last columns that assisted decoding guessed: dropped like text, but read by no signal.
        is_visual: bool [B, S]; None: no image came with this call.
        valid_counts: valid columns of each sample.
        layout: of the uncompressed tokens of each group; None: no image came with this call.
        media: what each of these groups is.
    """

    batch: int
    length: int
    device: torch.device
    cache: Any = None
    memory: Memory | None = None
    past: int = 0
    held: int = 0
    ids: Int[Tensor, "B S"] | None = None
    valid: Bool[Tensor, "B S"] | None = None
    candidates: int = 0
    is_visual: Bool[Tensor, "B S"] | None = None
    valid_counts: tuple[int, ...] = ()
    layout: Layout | None = None
    media: tuple[Medium, ...] = ()

    def arange(self, count: int, start: int = 0) -> Int[Tensor, "B J"]:
        """`start .. start + count - 1` for each sample."""
        return torch.arange(start, start + count, device=self.device).expand(self.batch, -1)

    def text(self) -> Bool[Tensor, "B S"]:
        """The columns that are neither visual nor padding."""
        assert self.is_visual is not None
        return ~self.is_visual if self.valid is None else ~self.is_visual & self.valid

    def before(self, layer: int) -> Held | None:
        """What `layer` held before this call; None: every column."""
        return None if self.memory is None else self.memory.layers[layer]

    def entries(self, layer: int) -> int:
        """How many entries `layer` held before this call."""
        before = self.before(layer)
        return self.held if before is None else before.entries

    def check_positions(self, positions: Tensor | None) -> None:
        """Refuse positions of another number of tokens.

        Raises:
            StateError: they are.
        """
        if positions is not None and positions.shape[-1] != self.length:
            raise StateError(
                f"the language model got positions for {positions.shape[-1]} tokens and embeddings of {self.length}. "
                "Positions come from position_ids, or, where the model counts them itself (Qwen-VL), from "
                "attention_mask: pass those of the new tokens, or leave them out."
            )

    def check_placeholders(self, placeholders: Sequence[int]) -> None:
        """A prompt without encoded images must not hold placeholders: the host would read them as text.

        Raises:
            InputError: it holds some.
        """
        if self.ids is None or self.length == 1:
            return
        if torch.isin(self.ids, torch.tensor(list(placeholders), device=self.ids.device)).any():
            raise InputError(
                "the prompt holds image placeholders, but no images came with it. Pass pixel_values with the prompt; "
                "prefill_chunk_size drops them: prefill in one piece; and leave an assistant_model unpatched: generate "
                "hands it no images."
            )

    def check_plain(self, positions: Tensor | None, mask: Any) -> None:
        """A call in which nothing is compressed, and whose cache, if there is one, must then be whole.

        Raises:
            StateError: layers hold different numbers of entries, or a mask or positions have another width.
        """
        self.check_positions(positions)
        if self.cache is None or host.is_static(self.cache):
            return
        if not host.is_whole(self.cache):
            raise StateError(
                "the layers of this KV cache hold different numbers of entries, so tokens were dropped from it, and "
                "what vtc noted on it is gone (copied tensor by tensor?). Prefill again, and pass on the cache itself."
            )
        if isinstance(mask, Tensor) and mask.dim() == 2:
            check_width(mask, host.held_length(self.cache), self.length)


def check_width(mask: Tensor, past: int, length: int) -> None:
    """Refuse a 2-D mask of another width than the conversation.

    Raises:
        InputError: in a prefill.
        StateError: on a cache; the mask may be wrong, or the cache may have lost what vtc noted on it.
    """
    if mask.shape[1] == past + length:
        return
    what = (
        f"attention_mask covers {mask.shape[1]} columns, the prompt has {past + length} ({past} of them in the cache)"
    )
    if not past:
        raise InputError(f"{what}. Pass the mask of the whole conversation.")
    raise StateError(
        f"{what}. Pass the mask of the whole conversation; if you did, the KV cache holds fewer entries than it stands "
        "for and has lost what vtc noted on it (copied tensor by tensor?): prefill again."
    )
