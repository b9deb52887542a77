"""Applies what stages decide to a stock model.

Reading order: `handle` (what a user holds), `plan` (which stage acts where), `encoder` (sites before the LLM's
input), `tower` and `tower_groups` (inside the vision tower), `standalone`
(encoders without an LLM), `groups` (tiles and frames, and how they become images),
`door` (the LLM's input), `layers` (decoder layers), `visual` (which tokens are left, and where), `memory` (what a KV
cache knows). What is known of transformers itself, and checked at the patch, is in `host`.
"""

from vtc.engine.patch import Handle, compress, patch
from vtc.engine.vision.alone import EncoderHandle, compress_encoder, patch_encoder

__all__ = ["EncoderHandle", "Handle", "compress", "compress_encoder", "patch", "patch_encoder"]
