"""ACT's head filter: one head at a time, those that help are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from interp.calibration.calibration_method import Found, Method, heads_of
from interp.calibration.guard import adjusted, sign_test
from interp.calibration.splits import Bench, Outcome
from interp.edits.act import ACT
from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id
from interp.tasks.task import collate
from interp_hooks.edit import LiveEdit
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Steer

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.call import AttentionCall
    from interp_hooks.edit import Edit

Guard = Literal["bh", "none"]


@dataclass(frozen=True)
class HeadFilter(Method):
    """ACT (Yu et al., ICML 2024, arXiv 2406.15765) is tried in one (layer, head) at a time, and the
    heads are kept whose accuracy rises over the untouched model; where it stays, whose mean margin
    rises.

    With hundreds of heads some rise by chance, so with `guard="bh"` a head is kept only if its
    p-value passes Benjamini–Hochberg at `level`: twice the smaller one of McNemar's test on right
    answers and a sign test that also counts larger margins where right or wrong stays, paired and
    one-sided both. "none" is the paper's rule. Heads without a sink in any prompt are not tried:
    ACT changes nothing there.

    Args:
        beta, alpha, threshold: of `ACT`. layers: None for all (the paper left out the first two and
            the last).

    Misleads:
        With hundreds of heads some rise by chance. Calibrated on 32 texts it gained nothing on
        SmolLM2's held-out ones (−.01), and needles fell by .19.

    Presets: "paper" keeps every head that helps (`guard="none"`); "code" too, with the released
    code's absolute threshold 0.1.
    """

    beta: float = 0.4
    alpha: float = 5.0
    threshold: float | None = None
    layers: Sequence[int] | None = None
    guard: Guard = "bh"
    level: float = 0.05

    name = "act"
    summary = "the heads in which cutting attention sinks (ACT) helps"
    citation = "Yu et al., ICML 2024, arXiv 2406.15765"
    presets = {"paper": {"guard": "none"}, "code": {"guard": "none", "threshold": 0.1}}

    def __post_init__(self) -> None:
        check_guard(self.guard, self.level)
        self.edit(())

    def edit(self, heads: Sequence[Head] | None) -> ACT:
        """ACT in these heads; in all for None."""
        subset = None if heads is None else tuple(heads)
        return ACT(beta=self.beta, alpha=self.alpha, threshold=self.threshold, heads=subset)

    def find(self, bench: Bench) -> Found:
        heads = heads_of(bench.model, self.layers)
        with_sinks = self.with_sinks(bench)
        tried = [h for h in heads if h in with_sinks]
        kept, trials = filter_heads(
            bench, tried, lambda head: [self.edit([head])], self.guard, self.level
        )
        notes: list[str] = []
        if len(tried) < len(heads):
            notes.append(
                f"{len(heads) - len(tried)} of {len(heads)} heads have no sink in any prompt; not "
                "tried."
            )
        if not kept:
            how = f" at a false-discovery rate of {self.level:g}" if self.guard == "bh" else ""
            notes.append(f"No head helps{how}; the edit has no heads and changes nothing.")
            few = too_few(len(bench.train), len(tried), self.level) if self.guard == "bh" else None
            notes += [few] if few else []
        return Found([self.edit(kept)], trials, notes=notes)

    @torch.no_grad()
    def with_sinks(self, bench: Bench) -> set[Head]:
        """The heads that have a sink in some training prompt."""
        look = _SinkHeads(self.edit(None))
        model = bench.model
        bench.plan(steps=len(bench.train))
        with model.edit(look):
            for instance in bench.train:
                batch = collate([instance], pad_id(model.tokenizer), "prompt")
                forward(model, batch.input_ids, keep=1)
                bench.step("looking for sinks", 1)
        return look.found


class _SinkHeads(LiveEdit):
    """Notes in which heads an ACT would find sinks, and changes nothing."""

    def __init__(self, act: ACT):
        self.act = act
        self.found: set[Head] = set()

    def touches(self, call: AttentionCall) -> bool:
        return self.act.touches(call)

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        here = self.act.sinks(call, measure).any(-1).any(0)  # (heads,)
        self.found.update(
            Head(call.site.layer, h, call.site.tower) for h in here.nonzero().flatten().tolist()
        )
        return None


def check_guard(guard: str, level: float) -> None:
    """Raise `InputError` unless the guard exists and its level is a share."""
    if guard not in ("bh", "none"):
        raise InputError(f"The guard is 'bh' (Benjamini–Hochberg) or 'none', not {guard!r}.")
    if not 0 < level < 1:
        raise InputError(
            f"The level of the guard is a share between 0 and 1, like 0.05, not {level}."
        )


def too_few(n: int, heads: int, level: float) -> str | None:
    """What to say where not even a head that helps in all `n` instances is kept, alone among
    `heads` tried."""
    least = 2.0 ** (1 - n)  # twice the sign test's, as `judge_heads` has it
    together = math.ceil(heads * least / level)
    if together < 2:
        return None
    rule = f"unless at least {together} heads have it" if together <= heads else "whatever they do"
    return (
        f"With {n} training instances a head's p-value is {least:.2g} at best, and of {heads} "
        "heads tried none is kept "
        f"at a false-discovery rate of {level:g} {rule}; use n ≥ "
        f"{1 + math.ceil(math.log2(heads / level))}."
    )


def filter_heads(
    bench: Bench,
    heads: Sequence[Head],
    make: Callable[[Head], Sequence[Edit]],
    guard: Guard,
    level: float,
) -> tuple[list[Head], pd.DataFrame]:
    """(heads kept, trials): `make(head)` is tried for each head, alone, against the untouched
    model."""
    bench.plan(trials=len(heads))
    before = bench("train-untouched", [], "untouched")
    outcomes = [bench(f"head-{h.tower}{h.layer}-{h.head}", make(h), str(h)) for h in heads]
    trials = judge_heads(before, heads, outcomes, guard, level)
    return [h for h, kept in zip(heads, trials.kept, strict=True) if kept], trials


def judge_heads(
    before: Outcome, heads: Sequence[Head], outcomes: Sequence[Outcome], guard: Guard, level: float
) -> pd.DataFrame:
    """One row a head: `accuracy`, `margin` (means), their `_change`s, `better` and `worse`
    (instances; margins break ties), `p_accuracy` (McNemar), `p_sign` (better against worse), `p`
    (twice the smaller), `q` (adjusted), `kept`."""
    import pandas as pd

    base = before.standing
    rows = []
    for head, outcome in zip(heads, outcomes, strict=True):
        accuracy, margin = outcome.standing
        right = outcome.correct - before.correct
        sign = np.where(right != 0, right, outcome.margin - before.margin)
        rows.append(
            dict(
                layer=head.layer,
                head=head.head,
                accuracy=accuracy,
                accuracy_change=accuracy - base[0],
                margin=margin,
                margin_change=margin - base[1],
                better=int((sign > 0).sum()),
                worse=int((sign < 0).sum()),
                p_accuracy=sign_test(right),
                p_sign=sign_test(sign),
                rises=outcome.standing > base,
            )
        )
    columns = [
        "layer",
        "head",
        "accuracy",
        "accuracy_change",
        "margin",
        "margin_change",
        "better",
        "worse",
    ]
    trials = pd.DataFrame(rows, columns=[*columns, "p_accuracy", "p_sign", "rises"])
    trials["p"] = (2 * trials[["p_accuracy", "p_sign"]].min(axis=1)).clip(upper=1.0)
    trials["q"] = adjusted(trials.p)
    rises = trials.pop("rises").astype(bool)
    trials["kept"] = rises & (trials.q <= level) if guard == "bh" else rises
    return trials
