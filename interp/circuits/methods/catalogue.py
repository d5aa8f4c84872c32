"""Circuit methods by name. A new method is one file in `methods` and one line in this list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.circuits.methods.circuit_method import Method

registry: Registry[type[Method]] = Registry(
    "circuit method",
    "interp.circuits",
    {
        "discrete_sae": "interp.circuits.methods.discrete_sae:DiscreteSAE",
        "attribution_by_code": "interp.circuits.methods.attribution_by_code:AttributionByCode",
        "head_ablation": "interp.circuits.methods.head_ablation:HeadAblation",
        "attribution": "interp.circuits.methods.attribution:Attribution",
        "eap": "interp.circuits.methods.eap:EAP",
        "eap_ig": "interp.circuits.methods.eap_ig:EAPIG",
        "relp": "interp.circuits.methods.relp:RelP",
        "gim": "interp.circuits.methods.gim:GIM",
        "atp_star": "interp.circuits.methods.atp_star:AtPStar",
        "hisp": "interp.circuits.methods.hisp:HISP",
        "acdc": "interp.circuits.methods.acdc:ACDC",
        "edge_pruning": "interp.circuits.methods.edge_pruning:EdgePruning",
        "head_gating": "interp.circuits.methods.head_gating:HeadGating",
        "path_patching": "interp.circuits.methods.path_patching:PathPatching",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def names() -> list[str]:
    """Names of all methods that find circuits.

    Example:
        >>> interp.circuits.names()[:3]
        ['discrete_sae', 'attribution_by_code', 'head_ablation']
    """
    return registry.names()


def as_method(method: str | Method, preset: str | None, settings: dict[str, Any]) -> Method:
    """A method from its name, a preset and settings. Raises `UnknownNameError`, `InputError`."""
    from interp.circuits.methods.circuit_method import Method

    if isinstance(method, Method):
        if preset is not None or settings:
            raise InputError("Settings belong into the method where it is given as an object.")
        return method
    if is_file(method):
        return of_file(method, preset, settings)
    return registry.get(method).make(preset, **settings)


def is_file(method: object) -> bool:
    """Whether a method is named as FILE.py:function."""
    return isinstance(method, str) and (method.endswith(".py") or ".py:" in method)


def of_file(method: str, preset: str | None, settings: dict[str, Any]) -> Method:
    """The method of "FILE.py:function". Raises `InputError`."""
    from interp.circuits.methods.file_method import FileMethod

    if preset is not None or settings:
        raise InputError(f"A function of a file takes no preset and no settings: {method}.")
    return FileMethod.written(method)
