"""Modules that change how attention trains."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
