"""What goes into a model: rows of tokens, positions and padding, the context limit.
``interp.inputs.forward(model, ids, mask)``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
