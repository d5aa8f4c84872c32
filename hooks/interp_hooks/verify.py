"""The check on load: the tap sees every layer, changes nothing by itself, and what it changes
arrives."""

from __future__ import annotations

from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import LiveEdit
from interp_hooks.errors import ActivationError, TapError
from interp_hooks.logits import logits_of
from interp_hooks.model import HookedModel
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_hooks.wrapping import dtype_of

#: largest difference of logits, relative to their largest magnitude, that counts as equal
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class _Silence(LiveEdit):
    """z = 0 everywhere: must change the logits."""

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)


def _said(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, 0 for words that the model may not say (Chameleon sets those of image
    tokens to the least number there is, beside which all others are equal)."""
    if not logits.is_floating_point():
        return logits.float()
    return torch.where(logits <= torch.finfo(logits.dtype).min / 2, 0, logits).float()


@torch.no_grad()
def verify(model: HookedModel, sample: dict[str, torch.Tensor]) -> None:
    """Raise `TapError` unless tapped logits equal the untouched ones and a changed z changes them.

    Also checks attn_out = Σ_h z_h W_O,h + b_O on HuggingFace models; where it fails, `head_weights`
    is refused for that layer by name. Raises `ActivationError` if the untouched model itself gives
    NaN.
    """
    with model.clean():  # blocks of other handles on this model may be open
        _verify(model, sample)


def _verify(model: HookedModel, sample: dict[str, torch.Tensor]) -> None:
    out = model(**sample)
    plain = _said(logits_of(out))
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
        tapped_out = model(**sample)
    tapped = _said(logits_of(tapped_out))
    scale = float(plain[keep].abs().max().clamp_min(1e-6))
    allowed = TOLERANCE.get(dtype_of(model.module), 2e-2)
    worst = float((plain - tapped)[keep].abs().max()) / scale
    if not worst <= allowed:
        raise TapError(
            f"With the tap in place the logits of {model.name} differ from the untouched model's "
            f"by {worst:.1e} of "
            f"their size (allowed {allowed:.0e}): its attention does something the tap does not "
            "see, so it is refused."
        )
    for site, output in outputs.items():
        key = site.layer if site.is_main else (site.tower or site.kind, site.layer)
        model.compare_output(site, z[key], output, 10 * allowed)
    with model.edit(_Silence()):
        silenced = _said(logits_of(model(**sample)))
    if float((plain - silenced)[keep].abs().max()) <= allowed * scale * 0.01:
        raise TapError(
            f"Changing the heads' outputs leaves the logits of {model.name} as they are, so it is "
            "refused."
        )
    _verify_decoding(model, sample, (out, tapped_out), allowed * scale)


class _RefusedStepError(Exception):
    """The tap refuses to run a decode step."""


def _verify_decoding(
    model: HookedModel, sample: dict[str, torch.Tensor], outs: tuple[Any, Any], allowed: float
) -> None:
    """Raise `TapError` unless decode steps on the caches of the forwards `outs`, untouched and
    tapped, give the same logits, one after the other."""
    if not model.has_cache:
        return
    try:
        _compare_steps(model, sample, outs, allowed)
    except _RefusedStepError as refused:
        # what is refused at run time is never wrong; text without padding must work all the same
        mask = sample.get("attention_mask")
        if mask is None or bool(mask.all()) or set(sample) != {"input_ids", "attention_mask"}:
            raise refused.__cause__ from None  # type: ignore[misc]
        row = dict(input_ids=sample["input_ids"][mask.bool().all(1)][:1])
        plain = model(**row)
        with model.capture_z():
            tapped = model(**row)
        try:
            _compare_steps(model, row, (plain, tapped), allowed)
        except _RefusedStepError as again:
            raise again.__cause__ from None  # type: ignore[misc]


def _compare_steps(
    model: HookedModel, sample: dict[str, torch.Tensor], outs: tuple[Any, Any], allowed: float
) -> None:
    """Two decode steps; raises `TapError` where they differ, `_RefusedStepError` where the tap
    refuses to run one."""
    steps = _steps(sample, outs)
    caches = [getattr(out, "past_key_values", None) for out in outs]
    if steps is None or None in caches:
        return
    own: list[torch.Tensor] = []
    try:
        for step in steps:
            own.append(logits_of(model(**step[0], past_key_values=caches[0], use_cache=True)))
    except Exception:  # it decodes in some way of its own, which its `generate` knows
        return
    starts: list[set[int]] = []

    def note(stats: LayerStats) -> None:
        if stats.site.is_main:
            starts[-1].add(stats.q_start)

    for step, plain in zip(steps, own, strict=True):
        starts.append(set())
        try:
            with model.watch(Question(), note):
                tapped = logits_of(model(**step[1], past_key_values=caches[1], use_cache=True))
        except TapError as error:
            raise _RefusedStepError from error
        shown = torch.isfinite(plain.float()).all(-1)
        worst = (plain.float() - tapped.float())[shown].abs()
        if worst.numel() and not float(worst.max()) <= allowed:
            raise TapError(
                f"With the tap in place a decode step of {model.name} on top of its cache differs "
                "from the untouched model's, so it is refused."
            )
    first, second = starts
    if (first and second != {start + 1 for start in first}) or len(first) > 1:
        raise TapError(
            f"The cache of {model.name} does not tell where its next token stands (slots {first}, "
            f"then {second}), so it is refused."
        )


def _steps(
    sample: dict[str, torch.Tensor], outs: tuple[Any, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]] | None:
    """What two decode steps are given, untouched and tapped, after a forward of the sample; None
    where the sample has no tokens."""
    ids, mask = sample.get("input_ids"), sample.get("attention_mask")
    if ids is None or ids.ndim != 2 or ids.dtype.is_floating_point:
        return None
    states = [getattr(out, "encoder_last_hidden_state", None) for out in outs]
    steps = []
    for i in (1, 2):
        token = ids[:, i : i + 1]
        if states[0] is not None:
            given: dict[str, Any] = dict(decoder_input_ids=token)
            more = {} if mask is None else dict(attention_mask=mask)
            both = tuple({**given, **more, "encoder_outputs": (state,)} for state in states)
        else:
            given = dict(input_ids=token)
            if mask is not None and mask.ndim == 2:
                given["attention_mask"] = torch.nn.functional.pad(mask, (0, i), value=1)
            both = (given, given)
        steps.append(both)
    return steps  # type: ignore[return-value]
