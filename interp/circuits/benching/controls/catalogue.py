"""Controls by name. A new control is one file beside this and one line in this list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.circuits.methods.circuit_method import Method

_HERE = "interp.circuits.benching.controls"

controls: Registry[type[Method]] = Registry(
    "circuit control",
    "interp.circuit_controls",
    {
        "random_ranking": f"{_HERE}.random_ranking:RandomRanking",
        "head_norm": f"{_HERE}.head_norm:HeadNorm",
        "attention_weight": f"{_HERE}.attention_weight:AttentionWeight",
        "mean_abs_effect": f"{_HERE}.mean_abs_effect:MeanAbsEffect",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)
