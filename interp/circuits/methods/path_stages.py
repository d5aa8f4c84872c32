"""Path patching stage by stage: the heads that write the answer, then those that feed them, and so
on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from interp.circuits.methods.path_patching import OUTPUT, PathPatching, Receiver
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.circuits.methods.circuit_method import Found
    from interp.circuits.runs.paired_runs import PairedRuns
    from interp_hooks.heads import Head


@dataclass(frozen=True)
class Stage:
    """One step of the search: `heads` are the top senders to `receivers`, strongest first, of those
    in `senders`."""

    receivers: tuple[str, ...]
    heads: tuple[Head, ...]
    senders: tuple[Head, ...]
    found: Found

    @property
    def to(self) -> str:
        """The receivers in brief: "output", or "L2H1.qkv, L3H4.qkv"."""
        if self.receivers == (OUTPUT,):
            return OUTPUT
        inputs: dict[Head, str] = {}
        for head, wire in map(Receiver.parse, self.receivers):
            inputs[head] = inputs.get(head, "") + wire
        return ", ".join(f"{head}.{activations}" for head, activations in inputs.items())


def stages(
    runs: PairedRuns,
    share: float = 0.02,
    at_least: int = 2,
    depth: int = 2,
    activations: Sequence[str] = ("qkv",),
    least: float = 0.005,
    freeze_mlps: bool = False,
) -> list[Stage]:
    """Search from the final residual stream: its top senders, then the top senders to these heads'
    inputs, `depth` stages in all (Merullo et al. 2024, section 3).

    Of each stage the max(at_least, share·heads of the model) strongest by |effect| are kept, fewer
    where fewer are above `least`, a share of what corrupting costs. `activations[i]` says which
    inputs of stage i's heads are the receivers of stage i + 1, one or several of "q", "k", "v"; the
    last one holds for all later stages (the paper follows some of them by hand; "qkv" patches all
    inputs together). Senders to queries alone are patched at the last judged position, where the
    receivers act; senders to keys and values at all positions. The search ends early where no head
    comes before the receivers.

    Raises `InputError` for settings that make no sense.
    """
    if not 0 <= share <= 1 or at_least < 1 or depth < 1 or least < 0:
        raise InputError(
            "Stages need a share between 0 and 1, at_least 1 head, a depth of at least 1 and least "
            "≥ 0."
        )
    if not activations or any(not w or set(w) - set("qkv") for w in activations):
        raise InputError(
            'The activations of stages are q, k, v or several of them ("kv"), not '
            f"{', '.join(activations) or 'none'}."
        )
    most = max(at_least, round(share * len(runs.heads)))
    chain: list[Stage] = []
    receivers: tuple[str, ...] = (OUTPUT,)
    for number in range(depth):
        wire = "q" if number == 0 else activations[min(number, len(activations)) - 1]
        method = PathPatching(receivers, "end" if set(wire) == {"q"} else "all", freeze_mlps)
        senders = method.tried(runs)
        if not senders:
            break
        result = method.find(runs)
        assert result.effect is not None
        order = np.argsort(-result.score, kind="stable")
        tried = set(senders)
        heads = [
            runs.heads[i]
            for i in order[:most]
            if result.score[i] > least and runs.heads[i] in tried
        ]
        chain.append(Stage(method.receivers, tuple(heads), tuple(senders), result))
        if not heads:
            break
        following = activations[min(number + 1, len(activations)) - 1]
        receivers = tuple(str(Receiver(h, w)) for h in heads for w in following)
    return chain
