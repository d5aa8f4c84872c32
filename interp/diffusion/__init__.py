"""Diffusion models: pictures drawn in a sampling loop with heads observed and edited, guidance away
from what edited heads predict, and heads found for what is drawn.

    from interp import diffusion
    model = interp.load(pipe.transformer)              # or "dit", the bundled pocket-dit
    diffusion.draw(model, {"class_labels": labels}, edits=[SoftPAG(1.0, heads)], weight=1.0)
    diffusion.hunt(model, objective)                   # HeadHunter: which heads
"""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
