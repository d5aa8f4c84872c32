"""Caches that keep less: which kv heads need the whole text, and what the others can forget."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
