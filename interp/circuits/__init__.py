"""Which heads do a task: ``interp.circuits.find(model, task="ioi", method="discrete_sae")``.

Every method gives the same kind of table, a number a head, so that methods can be compared with
each other and with the truth (`evaluate`), checked on the model itself (`faithfulness`) and joined
with an atlas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.circuits.base import Method
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.circuits import planted as planted
    from interp.circuits import prompts as prompts
    from interp.circuits import reuse as reuse
    from interp.circuits.evaluation import Agreement as Agreement
    from interp.circuits.evaluation import compare as compare
    from interp.circuits.evaluation import evaluate as evaluate
    from interp.circuits.evaluation import precision_at as precision_at
    from interp.circuits.evaluation import ranks as ranks
    from interp.circuits.exhaustive import measured as measured
    from interp.circuits.faithful import faithfulness as faithfulness
    from interp.circuits.finding import find as find
    from interp.circuits.resampling import resampled as resampled
    from interp.circuits.result import Circuit as Circuit
    from interp.circuits.truth import Truth as Truth
    from interp.circuits.truth import published as published
    from interp.circuits.truth import published_names as published_names

registry: Registry[type[Method]] = Registry(
    "circuit method",
    "interp.circuits",
    {
        "discrete_sae": "interp.circuits.discrete_sae:DiscreteSAE",
        "head_ablation": "interp.circuits.head_ablation:HeadAblation",
        "attribution": "interp.circuits.attribution:Attribution",
        "eap": "interp.circuits.eap:EAP",
        "eap_ig": "interp.circuits.eap_ig:EAPIG",
        "hisp": "interp.circuits.hisp:HISP",
        "acdc": "interp.circuits.acdc:ACDC",
        "path_patching": "interp.circuits.path_patching:PathPatching",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)

_HOME = {
    "Agreement": "evaluation",
    "Circuit": "result",
    "Truth": "truth",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "faithfulness": "faithful",
    "find": "finding",
    "measured": "exhaustive",
    "precision_at": "evaluation",
    "published": "truth",
    "published_names": "truth",
    "ranks": "evaluation",
    "resampled": "resampling",
}
_MODULES = ("planted", "prompts", "reuse")

__all__ = [*_HOME, *_MODULES, "Method", "names", "registry"]


def names() -> list[str]:
    """Names of all methods."""
    return registry.names()


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp.circuits.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"interp.circuits.{name}")
    raise AttributeError(f"module 'interp.circuits' has no attribute {name!r}")
