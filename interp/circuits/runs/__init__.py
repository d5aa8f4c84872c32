"""A model at work on pairs of prompts: clean, corrupted and patched runs, gradients, edges."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
