"""Which models `interp.load` knows by name, and those fetched into the cache.
``interp.models.get("smollm2-135m")``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
