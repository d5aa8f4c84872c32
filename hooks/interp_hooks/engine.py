"""What happens at one attention call: statistics before edits, the edits, statistics after, z."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from interp_hooks.blocks import Observer, Tap
from interp_hooks.call import AttentionCall
from interp_hooks.edit import CallEdit
from interp_hooks.errors import EditError, InterpError, TapError
from interp_hooks.forward_notes import ForwardNotes
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_hooks.shown_weights import hand_rows, weights_of
from interp_hooks.steered import Steered, cut, gains
from interp_hooks.told import tell
from interp_kernels import (
    BackendError,
    Request,
    Result,
    Steer,
    attention,
    budget,
    explain,
)


def rewritten(call: AttentionCall, edits: Sequence[CallEdit]) -> AttentionCall:
    """The call with every touching edit's change of queries, keys, values or mask, left to
    right."""
    for edit in edits:
        if edit.touches(call):
            call = edit.before(call)
    return call


def steers_of(
    call: AttentionCall,
    edits: Sequence[CallEdit],
    ask: Callable[[Sequence[Steered], Request], Result],
) -> list[Steered]:
    """The steers of all touching edits, left to right; each may `ask` about the weights as those
    before it leave them."""
    steers: list[Steered] = []
    for edit in edits:
        if not edit.touches(call):
            continue

        def measure(request: Request) -> Result:
            with torch.no_grad():
                return ask(steers, request)

        steer = edit.steer(call, measure)
        if steer is not None and steer:
            start, stop = edit.rows(call) or (0, call.n_queries)
            start, stop = max(0, start), min(stop, call.n_queries)
            if start < stop:
                steers.append(Steered(steer, (start, stop)))
    return steers


@dataclass(frozen=True)
class Attended:
    """One call whose attention is computed and whose z is not yet what W_O reads.

    Attributes:
        call, edited: as it came, and after the edits' `before`.
        z: (batch, queries, heads, d_head), softmax·v.
        answers: what the observers' questions gave.
        edits: those that touch the call.
        steers: those whose gains z has not had.
    """

    call: AttentionCall
    edited: AttentionCall
    z: torch.Tensor
    answers: list[tuple[Observer, Result]]
    edits: list[CallEdit]
    steers: list[Steered]


def attend(call: AttentionCall, tap: Tap) -> torch.Tensor:
    """z (batch, queries, heads, d_head) of one call, telling the observers on the way.

    Raises `ActivationError` when z is not finite.
    """
    attended = begin(call, tap)
    z = attended.z
    shown = shows_weights(call, tap.observers)
    for edit in attended.edits:
        z = edit.apply(attended.edited, attend_anew(edit, attended.edited, z, shown))
    return deliver(attended, z)


def shows_weights(call: AttentionCall, observers: Sequence[Observer]) -> bool:
    """Whether someone asks for the weights as the edits leave them."""
    return call.weights is not None or any(
        o.stage == "after" and o.question.at(call.site).weights is not None for o in observers
    )


def attend_anew(edit: CallEdit, call: AttentionCall, z: torch.Tensor, shown: bool) -> torch.Tensor:
    """`edit.attend`; raises `TapError` where it leaves no weights to show to who asks for them."""
    new = edit.attend(call, z)
    if shown and new is not z:
        raise TapError(
            "The attention weights (output_attentions=True, model.look, model.attention) can't be "
            "shown here: an edit of this block puts another attention in place of softmax's in "
            f"layer {call.site.layer}; leave the block, or use model.observe(...)."
        )
    return new


def begin(call: AttentionCall, tap: Tap, late: bool = False) -> Attended:
    """The attention of one call under the edits' changes of inputs and weights.

    `late` where something stands between this output and W_O (an output gate, a norm): then other
    attentions are computed here, and factors on the heads' outputs wait for `at_projection`.
    """
    observers, edits, backend = tap.observers, tap.edits, tap.backend
    if call.holder is not None:
        return held(call, tap)
    if (quick := by_its_own_way(call, tap)) is not None:
        return quick
    edited = rewritten(call, edits)
    steers = steers_of(
        edited, edits, lambda found, request: _attention(edited, lambda _: request, backend, found)
    )
    changed = edited is not call or bool(steers)
    before = [o for o in observers if o.stage == "before"]
    after = [o for o in observers if o.stage == "after"]
    answers: list[tuple[Observer, Result]] = []
    if not changed:
        before, after = before + after, []
    elif before:
        answers += _ask(call, before, backend)[1]
    inside = [replace(s, steer=replace(s.steer, gain=None)) for s in steers] if late else steers
    result, more = _ask(edited, after if changed else before, backend, inside)
    z = result.out.transpose(1, 2)  # (batch, queries, heads, d)
    touching = [edit for edit in edits if edit.touches(call)]
    if late:
        shown = shows_weights(call, observers)
        for edit in touching:
            z = attend_anew(edit, edited, z, shown)
    for observer in observers:
        wanted = observer.question.at(call.site).weights
        if wanted is not None and observer.stage == "after":
            hand_rows(edited, wanted, steers)
        elif wanted is not None:
            hand_rows(call, wanted)
    if call.weights is not None:
        call.weights(weights_of(edited, steers))
    return Attended(call, edited, z, answers + more, touching, steers if late else [])


def asking(call: AttentionCall, observers: Sequence[Observer]) -> bool:
    """Whether someone asks anything of the attention weights."""
    return call.weights is not None or any(
        o.question.request(call) or o.question.at(call.site).weights for o in observers
    )


def untold(call: AttentionCall, z: torch.Tensor, tap: Tap) -> Attended:
    """What came of a call z (batch, heads, queries, d) of which nothing else is known."""
    none = Result(z, z.new_empty(0))
    edits = [edit for edit in tap.edits if edit.touches(call)]
    return Attended(call, call, z.transpose(1, 2), [(o, none) for o in tap.observers], edits, [])


def by_its_own_way(call: AttentionCall, tap: Tap) -> Attended | None:
    """The attention of a call under one edit that has a way of its own, and of which nothing but z
    is asked; None where that is not so, and where a backend was asked for by name."""
    touching = [edit for edit in tap.edits if edit.touches(call)]
    if len(touching) != 1 or tap.backend != "auto" or asking(call, tap.observers):
        return None
    z = touching[0].alone(call)
    return None if z is None else untold(call, z, tap)


def held(call: AttentionCall, tap: Tap) -> Attended:
    """The attention of a call whose cache holds its keys head by head, of which nothing but z can
    be asked. Raises `TapError` for statistics and for edits."""
    assert call.holder is not None
    touching = [edit for edit in tap.edits if edit.touches(call)]
    if touching or asking(call, tap.observers):
        what = "statistics of attention weights"
        if touching:
            edit = getattr(touching[0], "edit", touching[0])
            what = f"the edit {getattr(edit, 'name', type(edit).__name__)}"
        raise TapError(
            f"This cache holds keys head by head, and {what} would need all of them at "
            f"{call.site.place}; use an ordinary cache (the edit `gate` streams with one)."
        )
    return untold(call, call.holder.attend(call, tap.backend), tap)


def at_projection(attended: Attended, z: torch.Tensor) -> torch.Tensor:
    """What W_O is to read in place of z (batch, queries, heads, d_head), which an output gate or
    norm made of `attended.z`; the observers are told.

    Raises `ActivationError` when it is not finite.
    """
    gate = gate_values(attended.z, z) if attended.call.site.output_gate else None
    z = gains(z, attended.steers)
    for edit in attended.edits:
        z = edit.apply(attended.edited, z)
    return deliver(attended, z, gate)


def deliver(
    attended: Attended, z: torch.Tensor, gate: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """z itself, once it is known to be finite and the observers are told."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_finite(attended.call, z)
    found = []
    for observer, answer in attended.answers:
        question = observer.question
        stats = LayerStats(attended.call, answer, question, z if question.z else None)
        if gate is not None and "gate" in question.names:
            stats.rows["gate"] = gate()
        if compiling:
            found.append((observer, stats))
        else:
            observer.callback(stats)
    if compiling:
        tell(attended.call.site, z, found)
    return z


def gate_values(before: torch.Tensor, after: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Gives the mean over a head's dimensions of the gate g, after = g · before, as (batch, heads,
    queries); NaN where the head's output is zero, which hides its gate."""

    def mean() -> torch.Tensor:
        x, y = before.detach(), after.detach()
        batch, queries, heads, d = x.shape
        parts = [
            _mean_gate(x[:, a:b].float(), y[:, a:b].float(), torch.finfo(before.dtype).tiny)
            for a, b in budget.ranges(queries, batch * heads * d, x.device)
        ]
        return torch.cat([x.new_empty(batch, 0, heads).float(), *parts], 1).transpose(1, 2)

    return mean


def _mean_gate(x: torch.Tensor, y: torch.Tensor, tiny: float) -> torch.Tensor:
    # a quotient of subnormal numbers has no digits left
    shown = x.abs() > 16 * tiny
    ratio = torch.where(shown, y / torch.where(shown, x, 1), 0)
    return ratio.sum(-1) / shown.sum(-1)


def explain_call(call: AttentionCall, tap: Tap) -> str:
    """Which way the kernels would take this call under the edits, and why; "" if none of them
    touches it."""
    edits, backend = tap.edits, tap.backend
    if not any(edit.touches(call) for edit in edits):
        return ""
    try:
        if by_its_own_way(call, tap) is not None:
            return "streaming: the keys that blocks of queries list, for the heads of the edit"
        edited = rewritten(call, edits)
        steers = steers_of(
            edited,
            edits,
            lambda found, request: _attention(edited, lambda _: request, backend, found),
        )
    except EditError as error:  # it was made for other inputs than the probe
        return f"a way that depends on the input ({error})"
    assert edited.query is not None and edited.key is not None
    return explain(
        edited.query,
        edited.key,
        edited.value,
        **edited.settings,
        request=Request(lse=False),
        steer=[s.steer for s in steers] or None,
        backend=backend,
    )


def _ask(
    call: AttentionCall, observers: Sequence[Observer], backend: str, steers: Sequence[Steered] = ()
) -> tuple[Result, list]:
    """One attention with the first observer's request, one more for each further one."""
    answers = []
    first: Result | None = None
    for observer in observers:
        result = _attention(call, observer.question.request, backend, steers)
        first = first or result
        answers.append((observer, result))
    return first or _attention(call, Question().request, backend, steers), answers


def _attention(
    call: AttentionCall,
    request_of: Callable[[AttentionCall], Request],
    backend: str,
    steers: Sequence[Steered] = (),
) -> Result:
    """The call's attention under the steers; where these concern some query rows only, a call a
    range of rows."""
    edges = sorted({0, call.n_queries} | {edge for s in steers for edge in s.rows})
    if len(edges) <= 2:
        return _one(call, request_of(call), backend, [s.steer for s in steers])
    parts, requests = [], []
    for start, stop in itertools.pairwise(edges):
        part = call.part(start, stop)
        requests.append(request_of(part))
        here = [cut(s, start, stop) for s in steers if s.rows[0] <= start and stop <= s.rows[1]]
        parts.append(_one(part, requests[-1], backend, here))
    return join(parts, requests)


def _one(call: AttentionCall, request: Request, backend: str, steers: Sequence[Steer]) -> Result:
    assert call.query is not None and call.key is not None
    try:
        return attention(
            call.query,
            call.key,
            call.value,
            **call.settings,
            request=replace(request, lse=False),
            steer=list(steers) or None,
            backend=backend,
        )
    except (ValueError, TypeError) as error:
        # Each edit was checked by itself; what the kernels refuse is how they come together.
        if not steers or isinstance(error, InterpError | BackendError):
            raise
        raise EditError(
            f"The edits can't act as they are at layer {call.site.layer}: {error}"
        ) from error


def join(parts: Sequence[Result], requests: Sequence[Request]) -> Result:
    """Consecutive ranges of query rows as one result; what keys received is combined over them."""
    stats: dict[str, torch.Tensor] = {}
    for name in parts[0].stats:
        kind, _, label = name.partition(":")
        values = [p.stats[name] for p in parts]
        if kind == "received_count":
            stats[name] = torch.stack(values).sum(0)
        elif kind == "received":
            how = requests[0].received[label].reduce
            counts = [p.stats[f"received_count:{label}"] for p in parts]
            if how == "max":
                stats[name] = torch.stack(values).amax(0)
            elif how == "sum":
                stats[name] = torch.stack(values).sum(0)
            else:
                total = torch.stack([v * c for v, c in zip(values, counts, strict=True)]).sum(0)
                stats[name] = total / torch.stack(counts).sum(0).clamp_min(1)
        else:
            stats[name] = torch.cat(values, 2)
    return Result(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2), stats)


def check_finite(call: AttentionCall, z: torch.Tensor) -> None:
    """Raise `ActivationError` naming the layer if z has NaN or infinity, on a device when its
    forward ends, where that is known."""
    notes = ForwardNotes() if call.notes is None else call.notes
    notes.check_finite(call, z)
    if call.notes is None:
        notes.ends()
