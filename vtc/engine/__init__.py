"""Applies what stages decide to a stock model, in the order of a token's way.

`patch` is what a user holds; `planning` makes the `plan` (which stage acts where), `refusals` says no. `decide` runs
one stage on tokens, without a model in sight. `vision` acts before the language model, `llm` at its door, in its layers
and on its cache; they meet in `handover`. What is known of transformers itself, and checked at the patch, is in `host`.
"""

from vtc.engine.patch import EncoderHandle, Handle, compress, compress_encoder, patch, patch_encoder

__all__ = ["EncoderHandle", "Handle", "compress", "compress_encoder", "patch", "patch_encoder"]
