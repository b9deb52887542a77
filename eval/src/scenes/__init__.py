"""Drawn scenes with their questions, and the embedded model that was trained on them."""
