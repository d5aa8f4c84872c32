"""See and steer every attention head, at the context length the model is really used at.

    import interp
    model = interp.load("llama")
    atlas = interp.scan_heads(model)
    atlas.top("retrieval", 10)

Names are imported when first used: `import interp` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from interp import circuits as circuits
    from interp import edits as edits
    from interp import mechanics as mechanics
    from interp import models as models
    from interp import procedures as procedures
    from interp import scenes as scenes
    from interp import scores as scores
    from interp import tasks as tasks
    from interp import vision as vision
    from interp.ablation import ablate as ablate
    from interp.atlas import Atlas as Atlas
    from interp.calibration import calibrate as calibrate
    from interp.calibration.result import Calibration as Calibration
    from interp.curves import rhythm as rhythm
    from interp.errors import InterpError as InterpError
    from interp.evaluation import evaluate as evaluate
    from interp.loading import load as load
    from interp.result import Evaluation as Evaluation
    from interp.scan import plan_scan as plan_scan
    from interp.scan import scan_heads as scan_heads
    from interp_hooks.heads import Head as Head

_HOME = {
    "Atlas": "interp.atlas",
    "Calibration": "interp.calibration.result",
    "Evaluation": "interp.result",
    "Head": "interp_hooks.heads",
    "InterpError": "interp.errors",
    "ablate": "interp.ablation",
    "calibrate": "interp.calibration",
    "evaluate": "interp.evaluation",
    "load": "interp.loading",
    "plan_scan": "interp.scan",
    "rhythm": "interp.curves",
    "scan_heads": "interp.scan",
}
_MODULES = (
    "circuits",
    "edits",
    "mechanics",
    "models",
    "procedures",
    "scenes",
    "scores",
    "tasks",
    "vision",
)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"interp.{name}")
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
