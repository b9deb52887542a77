"""Which text a stage means."""

from jaxtyping import Bool
from torch import Tensor, where

from vtc.tokens import Tokens


def instruction(tokens: Tokens) -> Bool[Tensor, "B T"]:
    """The text tokens behind the last visual token, where the question stands; all of them where none are behind.

    Needs a text signal and `text_after`.
    """
    is_text = tokens.signal("text_mask")
    behind = is_text & tokens.signal("text_after")
    return where(behind.any(dim=1, keepdim=True), behind, is_text)
