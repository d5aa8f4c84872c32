"""Edits by name. A new edit is one file here and one line in this list."""

from __future__ import annotations

from interp.edits.head_edit import HeadEdit
from interp.support.registry import Registry

registry: Registry[type[HeadEdit]] = Registry(
    "edit",
    "interp.edits",
    {
        "scale_heads": "interp.edits.scale_heads:ScaleHeads",
        "ablate": "interp.edits.ablate:Ablate",
        "scale_tokens": "interp.edits.scale_tokens:ScaleTokens",
        "zero_tuning": "interp.edits.zero_tuning:ZeroTuning",
        "act": "interp.edits.act:ACT",
        "move_mass": "interp.edits.move_mass:MoveMass",
        "var": "interp.edits.var:VAR",
        "vhr": "interp.edits.vhr:VHR",
        "temperature": "interp.edits.temperature:Temperature",
        "soft_pag": "interp.edits.soft_pag:SoftPAG",
        "paint": "interp.edits.paint:PAINT",
        "overwrite_row": "interp.edits.overwrite_row:OverwriteRow",
        "streaming": "interp.edits.streaming:Streaming",
        "gate": "interp.edits.gate:Gate",
        "sigmoid_attention": "interp.edits.sigmoid_attention:SigmoidAttention",
        "softplus_reweight": "interp.edits.softplus_reweight:SoftplusReweight",
        "head_gate": "interp.edits.head_gate:HeadGate",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)
