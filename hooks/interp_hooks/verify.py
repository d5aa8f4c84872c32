"""The check on load: the tap sees every layer, changes nothing by itself, and what it changes
arrives."""

from __future__ import annotations

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import LiveEdit
from interp_hooks.errors import ActivationError, TapError
from interp_hooks.logits import logits_of
from interp_hooks.model import HookedModel

#: largest difference of logits, relative to their largest magnitude, that counts as equal
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class _Silence(LiveEdit):
    """z = 0 everywhere: must change the logits."""

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)


@torch.no_grad()
def _said(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, 0 for words that the model may not say (Chameleon sets those of image
    tokens to the least number there is, beside which all others are equal)."""
    if not logits.is_floating_point():
        return logits.float()
    return torch.where(logits <= torch.finfo(logits.dtype).min / 2, 0, logits).float()


def verify(model: HookedModel, sample: dict[str, torch.Tensor]) -> None:
    """Raise `TapError` unless tapped logits equal the untouched ones and a changed z changes them.

    Also checks attn_out = Σ_h z_h W_O,h + b_O on HuggingFace models; where it fails, `head_weights`
    is refused for that layer by name. Raises `ActivationError` if the untouched model itself gives
    NaN.
    """
    plain = _said(logits_of(model(**sample)))
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
    with model.layer_outputs() as outputs, model.capture_z() as z:
        tapped = _said(logits_of(model(**sample)))
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
        key = site.layer if site.is_main else (site.tower or site.kind, site.layer)
        model.compare_output(site, z[key], out, 10 * allowed)
    with model.edit(_Silence()):
        silenced = _said(logits_of(model(**sample)))
    if float((plain - silenced)[keep].abs().max()) <= allowed * scale * 0.01:
        raise TapError(
            f"Changing the heads' outputs leaves the logits of {model.name} as they are, so it is "
            "refused."
        )
