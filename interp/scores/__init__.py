"""Scores of attention heads, by name. ``interp.scores.get("induction").reading`` says how to read
one."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
