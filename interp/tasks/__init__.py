"""Tasks: seeded prompts with known answers.
``interp.tasks.get("ioi").sample(tokenizer, 32, seed=0)``."""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
