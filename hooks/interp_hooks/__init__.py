"""How we get inside a model: one tap on the attention call, the residual stream, the head weights.

Names are imported when first used, so that `import interp_hooks` (and `interp --help`) does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall as AttentionCall
    from interp_hooks.call import Site as Site
    from interp_hooks.edit import Edit as Edit
    from interp_hooks.heads import Head as Head
    from interp_hooks.heads import parse_heads as parse_heads
    from interp_hooks.hooking import hook as hook
    from interp_hooks.model import HookedModel as HookedModel
    from interp_hooks.recording import LayerStats as LayerStats
    from interp_hooks.recording import Question as Question
    from interp_hooks.recording import Seen as Seen
    from interp_hooks.weights import HeadWeights as HeadWeights

_HOME = {
    "AttentionCall": "call",
    "Site": "call",
    "Edit": "edit",
    "Head": "heads",
    "parse_heads": "heads",
    "HookedModel": "model",
    "LayerStats": "observe",
    "Question": "observe",
    "Seen": "observe",
    "HeadWeights": "weights",
    "hook": "hooking",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp_hooks.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp_hooks' has no attribute {name!r}")
