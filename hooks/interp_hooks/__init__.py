"""How we get inside a model: one tap on the attention call, the residual stream, the head weights.

Names are imported when first used, so that `import interp_hooks` (and `interp --help`) does not
load torch. They are listed in the stub beside this file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
