"""What differs between model families, and nothing else.

The engine asks an adapter where things are; the adapter never decides or changes anything. One subclass per family
lives in `vtc.adapters`; those modules are imported by name on first use, so the core does not depend on them.
"""

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vtc.errors import UnsupportedModelError
from vtc.signals import SIGNALS
from vtc.tokens import Layout

#: packages whose import registers adapters; the one place where the core names something above it
ADAPTER_PACKAGES = ("vtc.adapters",)

_ADAPTERS: dict[str, type["Adapter"]] = {}
A = TypeVar("A", bound=type["Adapter"])


@dataclass(frozen=True)
class Attention:
    """The modules of one self-attention whose outputs are its queries and keys before RoPE.

    Args:
        query, key: the modules; the same one where a projection holds queries, keys and values side by side.
        num_heads, num_key_heads, head_dim: its shape.
        scale: factor of the logits.
        output: the projection whose output the attention returns (o_proj).
        fused: whether `query` and `key` are such a common projection.
        heads_first: whether the outputs are [B, H, L, d] already (a norm that acts after the transpose).
        project: where no module makes queries and keys (`query` and `key` are then the attention itself): from 0 or 1
            and what enters the attention, the queries or keys [B, L, H*d].
    """

    query: nn.Module
    key: nn.Module
    num_heads: int
    num_key_heads: int
    head_dim: int
    scale: float
    output: nn.Module | None = None
    fused: bool = False
    heads_first: bool = False
    project: Callable[[int, Tensor], Tensor] | None = None

    def split_queries(self, output: Tensor) -> Tensor:
        """[B, L, H*d] -> [B, H, L, d]; also [B, L, H, d] (a norm per head) and [L, H*d] (one packed sequence)."""
        return self._split(output, 0, self.num_heads)

    def split_keys(self, output: Tensor) -> Tensor:
        """The same for keys: [B, G, L, d], G key heads."""
        return self._split(output, 1, self.num_key_heads)

    def _split(self, output: Tensor, part: int, heads: int) -> Tensor:
        if self.project is not None:
            output = self.project(part, output)
        if self.heads_first:
            return output
        if output.dim() == 2:
            output = output[None]
        if self.fused:
            output = output.unflatten(-1, (3, heads * self.head_dim))[:, :, part]
        return output.reshape(*output.shape[:2], heads, self.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Halves:
    """The two residual halves of a pre-norm block: x + a(norm(x)), then x + m(norm(x)).

    Each half is the identity where its module returns zeros, whatever norms and scales stand around it; so the block's
    own code runs one half after the other, and a `tower[i]` stage acts between them.

    Args:
        attention: a; called with the normed tokens first (or as `hidden_states`).
        mlp: m.
        returns_tuple: whether the attention returns its output as the first of a pair.
        mask: its argument for what is added to the logits: [B, 1, 1, L], or [B, L] where it is "key_padding_mask".
    """

    attention: nn.Module
    mlp: nn.Module
    returns_tuple: bool = True
    mask: str = "attention_mask"


@dataclass(frozen=True)
class Resize:
    """How a tower of fixed resolution runs on a smaller image, with interpolated position embeddings.

    Args:
        token: pixels on the side of what becomes one token at `tower_out`.
        flag: argument of the tower that asks for the interpolation; None: it interpolates by itself.
        square: whether the host takes square grids only.
    """

    token: int
    flag: str | None = "interpolate_pos_encoding"
    square: bool = False


@dataclass(frozen=True)
class Encoder:
    """One modality of a model: how its pixels become features in the LLM's placeholders.

    Args:
        modality: "image" or "video".
        method: name of the method of the inner model that encodes, e.g. "get_image_features".
        placeholder_id: token id that the features replace.
        tower: the vision tower.
        features: module whose first input are the features at `tower_out`, [groups, tokens, width]; None where the
            host changes the tokens after its projector: `tower_out` then acts on the encoder's `pooler_output`.
        feature_layers: tower blocks whose outputs are concatenated to the features (the last one gives the signals).
        attention: self-attention of the block that gives the signals.
        num_prefix: [CLS] and register tokens in front of the patches inside the tower.
        drops_prefix: whether the host takes them off before `features`.
        block: the block that gives the signals; None: the last of `feature_layers`.
        rotary: whether its queries and keys are rotated by the `position_embeddings` handed to the block.
        segments: from the arguments of the block and the device, which tokens attend to each other ([B, L] int64, -1
            is padding); None: all tokens of a group.
        blocks: all blocks of the tower, in order.
        attention_of: the self-attention of one of them; None: only `attention` is known.
        halves: the residual halves of one of them, or why no stage can act inside this tower.
        joins_tiles: whether the host joins the tiles of an image before `tower_out`.
        resize: how the tower runs on a smaller image, or why it cannot.
        pool: from a signal of the tower's patches [groups, patches, C] and the arguments of the call, that signal for
            the tokens at `tower_out`, by the rule by which the host makes these tokens; None: they are the patches.
    """

    modality: str
    method: str
    placeholder_id: int
    tower: nn.Module
    features: nn.Module | None
    feature_layers: tuple[nn.Module, ...]
    attention: Attention
    num_prefix: int
    drops_prefix: bool
    block: nn.Module | None = None
    rotary: bool = False
    segments: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    pool: Callable[[Tensor, Mapping[str, Any]], Tensor] | None = None
    blocks: tuple[nn.Module, ...] = ()
    attention_of: Callable[[Any], Attention] | None = None
    halves: Callable[[Any], Halves] | str = "its adapter does not name the halves of a block"
    joins_tiles: bool = False
    resize: Resize | str = "its adapter does not say how"

    @property
    def signal_block(self) -> nn.Module:
        """The block that gives the signals."""
        return self.block if self.block is not None else self.feature_layers[-1]

    @property
    def depth(self) -> int:
        """Which of `blocks` gives the signals; 0 where they are not known."""
        return next((i for i, block in enumerate(self.blocks) if block is self.signal_block), 0)

    @property
    def reach(self) -> int:
        """How many of `blocks`, from the first, come before any feature is taken: where `tower[i]` stages may act."""
        return 1 + next((i for i, block in enumerate(self.blocks) if any(block is f for f in self.feature_layers)), -1)

    def block_attention(self, index: int) -> Attention:
        """The self-attention of tower block `index`."""
        if index == self.depth or self.attention_of is None:
            return self.attention
        return self.attention_of(self.blocks[index])

    def lacks(self, signal: str, layer: int = 0) -> str | None:
        """Why `signal` (of the block `layer` after the one that gives the signals) does not exist at `tower_out`.

        None where it does.
        """
        kind = SIGNALS[signal]
        if kind.block == "every" and not self.blocks:
            return "its adapter does not name the blocks of its tower"
        if "tile" in kind.of and self.joins_tiles:
            return "the host scales and packs the tiles of an image into one grid before `tower_out`"
        if "cls" in kind.of and not self.num_prefix:
            return f"its tower {type(self.tower).__name__} has no [CLS] token"
        if "hidden" in kind.of and not self.drops_prefix:
            return "vision_feature_select_strategy='full' already keeps [CLS] among the features"
        if "hidden" in kind.of and (self.features is None or self.pool is not None):
            return "several patches make one token before `tower_out`, and [CLS] is not such a token"
        if kind.block == "first":
            if not 0 <= layer < max(1, len(self.blocks)):
                return f"its tower has the blocks 0..{len(self.blocks) - 1}, and block {layer} is none of them"
        elif layer and not 0 <= self.depth + layer < len(self.blocks):
            return (
                f"its features come from block {self.depth} of its tower, which has blocks 0..{len(self.blocks) - 1} "
                f"and none {layer:+d} from that (use layer=0)"
            )
        return None


@dataclass(frozen=True, eq=False)
class Packing:
    """How the groups that `tower_out` sees (tiles, frames) become images in the LLM.

    Args:
        slot: int64 [G, N], for each token of each group its slot among those of its image; -1: it never reaches the
            LLM (padding that the host cuts off), so no stage sees it.
        image: the image of each group, ascending.
        lengths: slots of each image in the LLM, separators included.
        layout: where each slot lies.
        separator: int64 [G, N], slot of the separator (newline) that stays exactly if one of its tokens stays; -1:
            none. Separators that no token names stay.
        tiles: (height, width) of each image in tiles, where its first group is the full image and the others are its
            tiles; (0, 0) for an image without tiles; None: groups are no tiles.
    """

    slot: Int[Tensor, "G N"]
    image: tuple[int, ...]
    lengths: tuple[int, ...]
    layout: Layout
    separator: Int[Tensor, "G N"] | None = None
    tiles: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One image or video as a model sees it.

    Args:
        segments: [3, H, W] of each of its tiles or frames, in the order in which layouts count them.
        modality: "image" or "video".
        tiles: rows and columns of those segments that are tiles of one image, raster order; None: they are frames.
        overview: the segment that shows the whole image beside its tiles; None: there is none.
    """

    segments: tuple[Tensor, ...]
    modality: str = "image"
    tiles: tuple[int, int] | None = (1, 1)
    overview: int | None = None


class Adapter(ABC):
    """Where the parts of one loaded model are.

    Subclasses set `family` and `model_types` and implement the abstract members. Everything is read from the loaded
    class and its config.
    """

    family: ClassVar[str]
    #: values of `config.model_type` that this adapter serves
    model_types: ClassVar[tuple[str, ...]]
    #: hub ids that the family's methods were published for
    checkpoints: ClassVar[tuple[str, ...]] = ()
    #: whether the inner model, not the language model, turns the 2-D mask into the masks of the layers
    masks_outside: ClassVar[bool] = False
    #: whether every token of the prompt sees every other, text included
    bidirectional_prompt: ClassVar[bool] = False
    #: whether positions are places on the image (M-RoPE), so that gaps between them cannot be closed
    multimodal_positions: ClassVar[bool] = False
    #: first version of transformers that places the pixels of a later turn rightly; "": every one that vtc allows
    later_pixels_since: ClassVar[str] = ""
    #: part of the model -> words that its forward must take beside those of every family, see `host.contract`
    words: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    #: whether one rotary embedding, a function of the position alone, serves all decoder layers
    renumbers: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    @abstractmethod
    def inner(self) -> nn.Module:
        """The module that embeds ids, encodes pixels and calls the language model."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The stack of decoder layers, with its embedding, final norm and rotary embedding."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""

    @abstractmethod
    def layer_attention(self, index: int) -> Attention:
        """The self-attention of decoder layer `index`."""

    @abstractmethod
    def keys_values(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values [B, G, L, d] that decoder layer `index` makes of what enters it, [B, L, D]."""

    @abstractmethod
    def queries(self, index: int, hidden: Tensor) -> Tensor:
        """Queries before RoPE [B, H, L, d] that decoder layer `index` makes of what enters it, [B, L, D]."""

    def layer_mlp(self, index: int) -> nn.Module:
        """The MLP of decoder layer `index`; its input is what the norm after the attention gives."""
        mlp: nn.Module = self.layers[index].mlp  # type: ignore[assignment]
        return mlp

    @abstractmethod
    def projections(self, index: int) -> tuple[nn.Module, tuple[nn.Module, ...], nn.Module]:
        """The self-attention of decoder layer `index`, the projections of its input, and that of its output."""

    def rotation(self, hidden: Tensor, positions: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
        """cos and sin [B, L, d] of `positions`, in the dtype of `hidden`; only where `renumbers`."""
        cos, sin = self.language_model.rotary_emb(hidden, positions)  # type: ignore[operator]
        return cos, sin

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last decoder layer."""

    @functools.cached_property
    @abstractmethod
    def encoders(self) -> tuple[Encoder, ...]:
        """One entry per modality."""

    @abstractmethod
    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        """For what `encoder` returned: tokens of each image in the LLM, and where each lies."""

    def packing(self, encoder: Encoder, arguments: Mapping[str, Any]) -> Packing | None:
        """How the groups of `tower_out` become images, for one call of `encoder`; None: each group is an image."""
        return None

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Picture, ...]:
        """Images, then videos, that a call of the model with `inputs` sees, with the pixels as they are handed over.

        The segments of all images follow each other as in `layout`, and so do those of all videos; several images of
        a layout may be tiles of one picture.

        Raises:
            InputError: pixels of a form that the family does not have.
            UnsupportedModelError: the adapter does not say how pixels lie.
        """
        raise UnsupportedModelError(
            f"the adapter of {self.family!r} does not say how pixels become a picture. Override Adapter.pictures."
        )

    def unavailable(self, signal: str, site: str, layer: int = 0) -> str | None:
        """Why the family cannot give `signal` (`layer` off) at `site`, or None where one of its encoders can."""
        if site not in ("tower", "tower_out"):
            return None
        reasons = [encoder.lacks(signal, layer) for encoder in self.encoders]
        return None if None in reasons else reasons[0]

    @property
    def lowest_layer(self) -> tuple[int, str]:
        """The first decoder layer before which tokens may be dropped, and why not earlier."""
        return 0, ""

    def cut_visual(self, kwargs: Mapping[str, Any], cut: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Arguments of the language model that hold visual tokens beside the embeddings, cut.

        `cut` takes [B, S, D] with a row for each column of the prompt to [B, R, D], rows that stay (merged where tokens
        were merged, zeros in padding).
        """
        return {}

    @property
    def window(self) -> int | None:
        """Columns that sliding-window layers see; None where every layer sees all."""
        config = self.text_config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        slides = window is not None if kinds is None else "sliding_attention" in kinds
        return window if slides else None

    @property
    def text_config(self) -> Any:
        """The language model's config."""
        return self.language_model.config

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device


def register_adapter(cls: A) -> A:
    """Class decorator that makes a family known for its model types."""
    for model_type in cls.model_types:
        _ADAPTERS[model_type] = cls
    return cls


def adapter_classes() -> tuple[type[Adapter], ...]:
    """Every known family, sorted by name."""
    _load()
    return tuple(sorted(set(_ADAPTERS.values()), key=lambda cls: cls.family))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or `model` itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a loaded model.

    Raises:
        UnsupportedModelError: no family serves it; the message lists those that are served.
    """
    _load()
    model = unwrap(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type, so it is no Hugging Face model that vtc can patch. "
            "Pass the loaded ...ForConditionalGeneration model."
        )
    if model_type not in _ADAPTERS:
        known = ", ".join(sorted(_ADAPTERS))
        part = next((known for known in _ADAPTERS if model_type in (f"{known}_text", f"{known}_vision")), None)
        hint = f" This is a part of a {part!r} model: pass the whole ...ForConditionalGeneration." if part else ""
        raise UnsupportedModelError(
            f"no adapter for model type {model_type!r}. Supported: {known}.{hint} "
            "How to add a family in one file: docs/adapters.md."
        )
    return _ADAPTERS[model_type](model)


def _load() -> None:
    for package in ADAPTER_PACKAGES:
        importlib.import_module(package)
