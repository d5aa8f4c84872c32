"""Edits inside a serving engine: as it can take them, and held against transformers."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
