"""How well a model does, with and without edits: accuracy, loss, pictures, other people's tasks."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
