"""Every keyword and attribute of transformers that vtc reads or writes, each once.

A rename by transformers is a line here. `vtc.engine.host.contract` checks at the patch that the host's signatures have
these words, so a rename that nobody made here is refused before it can be decoded wrongly.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

#: arguments of models and layers
INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
POSITION_EMBEDDINGS = "position_embeddings"
HIDDEN_STATES = "hidden_states"  # an argument of layers, and the field of outputs that lists all of them
LOGITS_TO_KEEP = "logits_to_keep"
ENCODER_OUTPUTS = "mm_encoder_outputs"  # modality -> what the encoder's method returned
TOKEN_TYPES = "token_type_ids"  # which tokens belong to an image (Gemma 3, PaliGemma)
PIXELS = "pixel_values"
IMAGE_PIXELS = "pixel_values_images"  # as Video-LLaVA's processor calls them
VIDEO_PIXELS = "pixel_values_videos"
FEATURE_LAYER = "vision_feature_layer"  # an argument of encoders, and a field of configs

#: the KV cache, newest word first; a host whose forward takes one of them translates the later ones inside it
CACHE_WORDS = ("cache", "past_key_values")

#: fields of outputs
LAST_HIDDEN = "last_hidden_state"
FEATURES = "pooler_output"  # what an encoder's method gives the LLM

#: fields of configs and modules
ATTENTION = "_attn_implementation"
CHECKPOINTING = "gradient_checkpointing"


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the forward of `module`, in order; empty where it takes whatever it is given."""
    cls: Any = type(module)
    return _parameters(cls, cls.forward)


def cache_words(module: nn.Module) -> tuple[str, ...]:
    """The words by which the forward of `module` takes a KV cache, its own first; empty: by none that we know."""
    known = parameters(module)
    if not known:  # a wrapper that hands on whatever it gets: what counts is how it is called
        return CACHE_WORDS
    own = next((i for i, word in enumerate(CACHE_WORDS) if word in known), len(CACHE_WORDS))
    return CACHE_WORDS[own:]


def find_cache(module: nn.Module, arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """The word by which a call of `module` with `arguments` names a KV cache (None counts; "": none), and the cache."""
    word = next((word for word in cache_words(module) if word in arguments), "")
    return word, arguments.get(word)


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """`cache` under the word by which `module` takes it.

    Example:
        >>> from vtc.testing import tiny
        >>> list(cache_argument(tiny("llava").model, None)) in (["cache"], ["past_key_values"])
        True
    """
    return {cache_words(module)[0]: cache}


def cache_of(output: Any) -> Any:
    """The KV cache of what a model, a language model or `generate` returned; None: there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    # the first word that the class has: older ones may be aliases that warn
    return next((getattr(output, word) for word in CACHE_WORDS if hasattr(output, word)), None)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of `module` with `args` and `kwargs` gives each parameter of its forward, extra keywords too."""
    return bound(_signature_of(module), args, kwargs)


def bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same by a `signature`."""
    given = signature.bind_partial(*args, **kwargs).arguments
    more = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    return {**given, **given.get(more, {})}


def attention_of(config: Any) -> str | None:
    """The attention implementation that a config selects: "eager", "sdpa", "flash_attention_2" ..."""
    implementation: str | None = getattr(config, ATTENTION)
    return implementation


def checkpoints(module: nn.Module) -> bool:
    """Whether `module` runs twice in training to save memory."""
    return module.training and bool(getattr(module, CHECKPOINTING, False))


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a layer, an attention or an MLP is called with."""
    return args[0] if args else kwargs[HIDDEN_STATES]


def with_hidden_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of such a call with other hidden states."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, HIDDEN_STATES: hidden})


def first_of(output: Any) -> Any:
    """The hidden states that a layer returned; older hosts return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: Any) -> Any:
    """What a layer returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def with_last_hidden(output: Any, hidden: Any) -> Any:
    """What a language model returned, with other hidden states behind its last layer."""
    if isinstance(output, tuple):
        return with_first(output, hidden)
    setattr(output, LAST_HIDDEN, hidden)
    return output


def features_of(output: Any) -> Any:
    """The features that an encoder's method returned: [images, N, D], or a sequence of [N, D]."""
    return getattr(output, FEATURES)


def _signature_of(module: nn.Module) -> inspect.Signature:
    cls: Any = type(module)  # not the instance's forward, which hooks and wrappers change
    return _signature(cls, cls.forward)


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@functools.cache
def _parameters(cls: type, forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name, one in _signature(cls, forward).parameters.items() if one.kind not in _REST)


@functools.cache
def _signature(cls: type, forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of the forward of `cls`, without self.

    A subclass whose forward has nothing but **kwargs beside parameters of the class that it extends takes what that
    class takes. One with a parameter of its own is taken at its word: it may be a renamed one.
    """
    signatures = [
        list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        for base in cls.__mro__
        if "forward" in vars(base) and base is not nn.Module
    ]
    for own, extended in itertools.zip_longest(signatures, signatures[1:], fillvalue=()):
        named = {one.name for one in own if one.kind not in _REST}
        hands_on = any(one.kind is one.VAR_KEYWORD for one in own)
        if not (hands_on and (extended or not named) and named <= {one.name for one in extended}):
            return inspect.Signature(own)
    return inspect.signature(_anything)


def _anything(*args: Any, **kwargs: Any) -> None:
    """What a wrapper takes that hands on whatever it gets."""
