"""The check on load: the tap sees every layer, changes nothing by itself, and what it changes
arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import Edit
from interp_hooks.errors import ActivationError, TapError
from interp_hooks.huggingface.adapter import HFAdapter
from interp_hooks.model import HookedModel
from interp_hooks.weights import head_output

#: largest difference of logits, relative to their largest magnitude, that counts as equal
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class _Silence(Edit):
    """z = 0 everywhere: must change the logits."""

    def touches(self, call: AttentionCall) -> bool:
        return True

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)


def _output(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if getattr(out, "logits", None) is not None else out[0]


@torch.no_grad()
def verify(model: HookedModel, sample: dict[str, torch.Tensor]) -> None:
    """Raise `TapError` unless tapped logits equal the untouched ones and a changed z changes them.

    Also checks attn_out = Σ_h z_h W_O,h + b_O on HuggingFace models; where it fails, `head_weights`
    is refused for that layer by name. Raises `ActivationError` if the untouched model itself gives
    NaN.
    """
    plain = _output(model(**sample)).float()
    real = sample["attention_mask"].bool() if "attention_mask" in sample else None
    keep = (
        real
        if real is not None and plain.ndim == 3 and real.shape == plain.shape[:2]
        else slice(None)
    )
    if not bool(torch.isfinite(plain[keep]).all()):
        raise ActivationError(
            f"{model.name} gives NaN or infinity on a short input: its weights look corrupt."
        )
    outputs: dict[Any, torch.Tensor] = {}
    hf = model._adapter if isinstance(model._adapter, HFAdapter) else None
    handles = []
    if hf is not None:
        for site in hf.sites:

            def note(module: Any, args: Any, output: Any, site: Any = site) -> None:
                outputs[site] = output[0] if isinstance(output, tuple) else output

            handles.append(hf.attention_module(site).register_forward_hook(note))
    try:
        with model.capture_z() as z:
            tapped = _output(model(**sample)).float()
    finally:
        for handle in handles:
            handle.remove()
    scale = float(plain[keep].abs().max().clamp_min(1e-6))
    allowed = TOLERANCE.get(next(model.module.parameters()).dtype, 2e-2)
    worst = float((plain - tapped)[keep].abs().max()) / scale
    if not worst <= allowed:
        raise TapError(
            f"With the tap in place the logits of {model.name} differ from the untouched model's "
            f"by {worst:.1e} of "
            f"their size (allowed {allowed:.0e}): its attention does something the tap does not "
            "see, so it is refused."
        )
    for site, out in outputs.items():
        assert hf is not None
        key = site.layer if site.is_main else (site.tower or site.kind, site.layer)
        try:
            weight, bias = head_output(hf.attention_module(site), site)
        except TapError as reason:
            hf.unsure_output[site] = str(reason)
            continue
        if z[key].shape[-1] != weight.shape[1]:
            hf.unsure_output[site] = (
                f"W_O takes {weight.shape[1]} numbers a head, z has {z[key].shape[-1]}."
            )
            continue
        expected = torch.einsum("bqhd,hdm->bqm", z[key].double(), weight.double())
        expected = expected + bias.double() if bias is not None else expected
        actual = out.double().reshape(expected.shape)
        error = float((expected - actual).abs().max() / actual.abs().max().clamp_min(1e-6))
        if error > 10 * allowed:
            hf.unsure_output[site] = (
                f"Σ_h z_h W_O,h differs from the layer's output by {error:.1e} of its size."
            )
    with model.edit(_Silence()):
        silenced = _output(model(**sample)).float()
    if float((plain - silenced)[keep].abs().max()) <= allowed * scale * 0.01:
        raise TapError(
            f"Changing the heads' outputs leaves the logits of {model.name} as they are, so it is "
            "refused."
        )
