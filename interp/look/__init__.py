"""Where one head looks in one text: `model.attention` and `model.look`."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
