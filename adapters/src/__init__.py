"""Model families: one file each. Importing this package registers them all."""

from vtc.adapters.llava import LlavaAdapter

__all__ = ["LlavaAdapter"]
