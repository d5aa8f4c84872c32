"""The kinds of input that scores are measured on, and how each is run. One forward serves all
scores of a probe."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
