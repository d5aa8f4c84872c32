"""See and steer every attention head, at the context length the model is really used at.

    import interp
    model = interp.load("llama")
    atlas = interp.scan_heads(model)
    atlas.top("retrieval", 10)

Names are imported when first used: `import interp` does not load torch. They are listed in the stub
beside this file.
"""

from interp.support.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
