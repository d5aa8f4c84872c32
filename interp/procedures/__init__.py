"""Procedures: what is more than an edit of one attention call.
``interp.procedures.APE().generate(model, …)``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
