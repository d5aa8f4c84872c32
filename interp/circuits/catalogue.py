"""Circuit methods by name. A new method is one file in `methods` and one line in this list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.circuits.circuit_method import Method

registry: Registry[type[Method]] = Registry(
    "circuit method",
    "interp.circuits",
    {
        "discrete_sae": "interp.circuits.methods.discrete_sae:DiscreteSAE",
        "head_ablation": "interp.circuits.methods.head_ablation:HeadAblation",
        "attribution": "interp.circuits.methods.attribution:Attribution",
        "eap": "interp.circuits.methods.eap:EAP",
        "eap_ig": "interp.circuits.methods.eap_ig:EAPIG",
        "hisp": "interp.circuits.methods.hisp:HISP",
        "acdc": "interp.circuits.methods.acdc:ACDC",
        "path_patching": "interp.circuits.methods.path_patching:PathPatching",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def names() -> list[str]:
    """Names of all methods."""
    return registry.names()
