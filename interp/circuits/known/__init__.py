"""Circuits that are known: published, measured by brute force, planted in weights."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
