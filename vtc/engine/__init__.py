"""Applies what stages decide to a stock model.

Reading order: `handle` (what a user holds), `plan` (which stage acts where), `encoder` (sites before the LLM's
input), `groups` (tiles and frames, and how they become images), `door` (the LLM's input), `layers` (decoder layers),
`visual` (which tokens are left, and where), `memory` (what a KV cache knows), `masks`, `rotary`.
"""

from vtc.engine.handle import Handle, compress, patch

__all__ = ["Handle", "compress", "patch"]
