"""How good a ranking is: against a truth, on the model itself, over other prompts and other
tasks."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
