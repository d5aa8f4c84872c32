"""What happens at one attention call: statistics before edits, the edits, statistics after, z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.edit import Edit
from interp_hooks.errors import ActivationError
from interp_hooks.observe import LayerStats, Question
from interp_kernels import Result, attention, pattern_statistics


@dataclass(frozen=True)
class Observer:
    """A question, when it is asked ("before" or "after" edits), and who gets each layer's answer."""

    question: Question
    tell: Callable[[LayerStats], None]
    stage: str = "before"


def rewrite(call: AttentionCall, edits: Sequence[Edit]) -> AttentionCall:
    """The call with every touching edit's change of queries, keys, values or mask, left to right."""
    for edit in edits:
        if edit.touches(call):
            call = edit.before(call)
    return call


def attend(call: AttentionCall, observers: Sequence[Observer], edits: Sequence[Edit], backend: str) -> torch.Tensor:
    """z (batch, queries, heads, d_head) of one call, telling the observers on the way.

    Raises `ActivationError` when z is not finite.
    """
    edited = rewrite(call, edits)
    before = [o for o in observers if o.stage == "before"]
    after = [o for o in observers if o.stage == "after"]
    answers: list[tuple[Observer, Result]] = []
    if edited is call:
        before, after = before + after, []
    elif before:
        answers += _ask(call, before, backend)[1]
    result, more = _ask(edited, after if edited is not call else before, backend)
    answers += more
    z = result.out.transpose(1, 2)  # (batch, queries, heads, d)
    for edit in edits:
        if edit.touches(call):
            z = edit.apply(edited, z)
    check_finite(call, z)
    for observer, answer in answers:
        observer.tell(LayerStats(call, answer, observer.question, z if observer.question.z else None))
    return z


def _ask(call: AttentionCall, observers: Sequence[Observer], backend: str) -> tuple[Result, list]:
    """One attention with the first observer's request, one more for each further one."""
    answers = []
    first: Result | None = None
    for observer in observers:
        result = _attention(call, observer.question, backend)
        first = first or result
        answers.append((observer, result))
    return first or _attention(call, Question(), backend), answers


def _attention(call: AttentionCall, question: Question, backend: str) -> Result:
    assert call.query is not None and call.key is not None
    return attention(
        call.query,
        call.key,
        call.value,
        mask=call.mask,
        scale=call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
        request=question.request(call),
        backend=backend,
    )


def tell_from_pattern(call: AttentionCall, observers: Sequence[Observer], z: torch.Tensor | None) -> None:
    """The same from a pattern that someone else computed (TransformerLens)."""
    assert call.pattern is not None
    for observer in observers:
        stats = pattern_statistics(call.pattern, call.mask, observer.question.request(call))
        answer = Result(call.value, call.value, stats)
        observer.tell(LayerStats(call, answer, observer.question, z if observer.question.z else None))


def check_finite(call: AttentionCall, z: torch.Tensor) -> None:
    """Raise `ActivationError` naming the layer if z has NaN or infinity."""
    if not bool(torch.isfinite(z).all()):
        where = f"{call.site.tower + ' ' if call.site.tower else ''}layer {call.site.layer}"
        raise ActivationError(
            f"The attention output of {where} has NaN or infinity; check the weights, or load the model in a wider "
            "dtype (dtype='float32')."
        )
