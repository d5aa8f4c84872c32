"""Edits of attention, by name: declarative, saved as JSON.
``with model.edit(interp.edits.Ablate(["L2H3"])): …``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
