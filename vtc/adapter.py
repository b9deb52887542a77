"""What differs between model families, and nothing else.

The engine asks an adapter where things are; the adapter never decides or changes anything. One subclass per family
lives in `vtc.adapters`; those modules are imported by name on first use, so the core does not depend on them.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vtc.errors import UnsupportedModelError
from vtc.tokens import Layout

#: packages whose import registers adapters; the one place where the core names something above it
ADAPTER_PACKAGES = ("vtc.adapters",)

_ADAPTERS: dict[str, type["Adapter"]] = {}
A = TypeVar("A", bound=type["Adapter"])


@dataclass(frozen=True)
class Attention:
    """The modules of one self-attention whose outputs are its queries and keys before RoPE."""

    query: nn.Module
    key: nn.Module
    num_heads: int
    num_key_heads: int
    head_dim: int
    scale: float

    def split_queries(self, output: Tensor) -> Tensor:
        """[B, L, H*d] (or [B, L, H, d], where a norm acts per head) -> [B, H, L, d]."""
        return output.reshape(*output.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def split_keys(self, output: Tensor) -> Tensor:
        """The same for keys: [B, G, L, d], G key heads."""
        return output.reshape(*output.shape[:2], self.num_key_heads, self.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Encoder:
    """One modality of a model: how its pixels become features in the LLM's placeholders.

    Args:
        modality: "image" or "video".
        method: name of the method of the inner model that encodes, e.g. "get_image_features".
        placeholder_id: token id that the features replace.
        tower: the vision tower.
        features: module whose first input are the features at `tower_out`, [groups, tokens, width].
        feature_layers: tower blocks whose outputs are concatenated to the features (the last one gives the signals).
        attention: self-attention of the last feature layer.
        num_prefix: [CLS] and register tokens in front of the patches inside the tower.
        drops_prefix: whether the host takes them off before `features`.
    """

    modality: str
    method: str
    placeholder_id: int
    tower: nn.Module
    features: nn.Module
    feature_layers: tuple[nn.Module, ...]
    attention: Attention
    num_prefix: int
    drops_prefix: bool


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

    def __init__(self, model: nn.Module) -> None:
        self.model = model

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

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last decoder layer."""

    @property
    @abstractmethod
    def encoders(self) -> tuple[Encoder, ...]:
        """One entry per modality."""

    @abstractmethod
    def layout(self, encoder: Encoder, output: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], Layout]:
        """For what `encoder` returned: tokens of each image in the LLM, and where each lies."""

    @abstractmethod
    def unavailable(self, signal: str, site: str) -> str | None:
        """Why the family cannot give `signal` at `site`, or None where it can."""

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


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a loaded model.

    Raises:
        UnsupportedModelError: no family serves it; the message lists those that are served.
    """
    _load()
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type, so it is no Hugging Face model that vtc can patch. "
            "Pass the loaded ...ForConditionalGeneration model."
        )
    if model_type not in _ADAPTERS:
        known = ", ".join(sorted(_ADAPTERS))
        raise UnsupportedModelError(f"no adapter for model type {model_type!r}. Supported: {known}.")
    return _ADAPTERS[model_type](model)


def _load() -> None:
    for package in ADAPTER_PACKAGES:
        importlib.import_module(package)
