"""Edits of attention, by name: declarative, saved as JSON. ``with
model.edit(interp.edits.Ablate(["L2H3"])): …``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.edits.base import HeadEdit, from_json, load, registry, save, to_json

if TYPE_CHECKING:
    from interp.edits.ablate import Ablate as Ablate
    from interp.edits.act import ACT as ACT
    from interp.edits.gate import Gate as Gate
    from interp.edits.head_gate import HeadGate as HeadGate
    from interp.edits.move_mass import MoveMass as MoveMass
    from interp.edits.overwrite_row import OverwriteRow as OverwriteRow
    from interp.edits.paint import PAINT as PAINT
    from interp.edits.scale_heads import ScaleHeads as ScaleHeads
    from interp.edits.scale_tokens import ScaleTokens as ScaleTokens
    from interp.edits.sigmoid_attention import SigmoidAttention as SigmoidAttention
    from interp.edits.soft_pag import SoftPAG as SoftPAG
    from interp.edits.softplus_reweight import SoftplusReweight as SoftplusReweight
    from interp.edits.streaming import Streaming as Streaming
    from interp.edits.temperature import Temperature as Temperature
    from interp.edits.var import VAR as VAR
    from interp.edits.vhr import VHR as VHR
    from interp.edits.zero_tuning import ZeroTuning as ZeroTuning

_HOME = {
    "ACT": "act",
    "Ablate": "ablate",
    "Gate": "gate",
    "HeadGate": "head_gate",
    "MoveMass": "move_mass",
    "OverwriteRow": "overwrite_row",
    "PAINT": "paint",
    "ScaleHeads": "scale_heads",
    "ScaleTokens": "scale_tokens",
    "SigmoidAttention": "sigmoid_attention",
    "SoftPAG": "soft_pag",
    "SoftplusReweight": "softplus_reweight",
    "Streaming": "streaming",
    "Temperature": "temperature",
    "VAR": "var",
    "VHR": "vhr",
    "ZeroTuning": "zero_tuning",
}

__all__ = [*_HOME, "HeadEdit", "from_json", "load", "registry", "save", "to_json"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp.edits.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp.edits' has no attribute {name!r}")
