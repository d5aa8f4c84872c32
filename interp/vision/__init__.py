"""Pictures in prompts, and what heads make of them.
``interp.vision.with_images(model, "describe the picture :", [picture])``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
