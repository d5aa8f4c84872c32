"""Finding good settings of edits:
``interp.calibrate(model, method="act", task="classification", out="act.json")``.

Settings are chosen on a training split and reported on a held-out one that the choice never saw.
"""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
