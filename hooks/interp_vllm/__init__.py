"""Edits and statistics of attention heads inside vLLM, another for each request.

A plugin of vLLM: where `interp` is installed beside it, an engine started with
``additional_config={"interp": True}`` serves requests whose ``extra_args`` hold `asking(…)`. Names
are imported when first used; vLLM itself is imported by the engine alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
