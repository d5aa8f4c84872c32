"""What changes attention at one call: logits before the softmax, a rule over groups of keys after it, gains on z."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GROUPS = 8
MAX_TESTS = 4
#: Receivers that hold less of a row are as good as invisible: dividing by it would overflow float32.
NOTHING = 1e-30


@dataclass(frozen=True)
class Rule:
    """A redistribution of weights between groups of keys, from their masses P_g = Σ_{k in g} A:

        w_g = keep_g·P_g + receive_g·P_g / (Σ_r receive_r·P_r) · Σ_g (1 − keep_g)·P_g        A' = A·w_g/P_g

    What `keep` takes away is shared out in proportion to receive·P. A row none of whose receivers is visible (holds
    more than 1e-30) stays as it is; without `receive` (or all 0) the mass is gone. ACT: keep (1, β), receive (1, 0).
    With ``renormalise`` (and no `receive`): w_g = keep_g·P_g / (Σ keep·P + P_sink), which adds ln keep to the logits.

    keep, receive: (heads or 1, groups). tests (tests, groups), bounds (tests,): the rule applies to rows where
    tests·P ≥ bounds, all of them (VAR's portions are linear in P). rows (batch, queries) bool: only there.
    """

    keep: Tensor
    receive: Tensor | None = None
    renormalise: bool = False
    tests: Tensor | None = None
    bounds: Tensor | None = None
    rows: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.keep.shape[-1]


@dataclass(frozen=True)
class Steer:
    """An edit of one attention call, in this order:

    1. logits = temper · softcap(scale·q·k) + bias: ``temper`` (batch or 1, heads or 1, queries or 1), ``bias``
       (batch or 1, heads or 1, keys), −inf hides a key; ln a multiplies its weight by a and renormalises.
    2. A = softmax, or σ(logits + ``sigmoid``) where that is given (no normalisation; neither rule, sinks nor
       statistics then, and the log-sum-exp is ln Σ_k σ).
    3. ``rule`` over the groups that ``labels`` (batch or 1, heads or 1, keys), ints in 0 … groups − 1, or ``spans``
       ((start, stop, group) of key columns, known on the host; elsewhere group 0) define. Group 0 owns the main loop
       of the fused route: give it to most keys.
    4. ``blend`` (heads or 1,) = u: A ← (1 − u)·A + u·I, I the query's own key (SoftPAG); a row that does not see its
       own key by the mask stays as it is.
    5. ``gain`` (batch or 1, heads or 1, queries or 1) on the output; no part of A.

    The log-sum-exp is that of step 2; statistics are of A after step 4 (counts of queries go by the mask alone). A
    row all of whose keys the bias hides has weights 0 (but for the blend) and log-sum-exp −inf.
    """

    temper: Tensor | None = None
    bias: Tensor | None = None
    sigmoid: float | None = None
    labels: Tensor | None = None
    spans: tuple[tuple[int, int, int], ...] = ()
    rule: Rule | None = None
    blend: Tensor | None = None
    gain: Tensor | None = None

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.temper, self.bias, self.sigmoid, self.rule, self.blend, self.gain))

    @property
    def tensors(self) -> list[Tensor]:
        """What a gradient may be asked for."""
        found = [self.temper, self.bias, self.blend, self.gain]
        if self.rule is not None:
            found += [self.rule.keep, self.rule.receive]
        return [t for t in found if t is not None]

    def to(self, device: torch.device) -> Steer:
        """The same with its tensors on `device`."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        rule = self.rule
        if rule is not None:
            receive, tests, bounds, rows = move(rule.receive), move(rule.tests), move(rule.bounds), move(rule.rows)
            rule = Rule(rule.keep.to(device), receive, rule.renormalise, tests, bounds, rows)
        temper, bias, labels = move(self.temper), move(self.bias), move(self.labels)
        blend, gain = move(self.blend), move(self.gain)
        return Steer(temper, bias, self.sigmoid, labels, self.spans, rule, blend, gain)

    def labels_of(self, keys: int, device: torch.device) -> Tensor:
        """(batch or 1, heads or 1, keys) int64 group of each key, from labels or spans."""
        if self.labels is not None:
            return self.labels.to(device=device, dtype=torch.int64)
        labels = torch.zeros(1, 1, keys, dtype=torch.int64, device=device)
        for start, stop, group in self.spans:
            labels[..., start:stop] = group
        return labels

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise `ValueError` naming the field whose shape or value does not fit."""
        shapes = {"temper": (batch, heads, queries), "bias": (batch, heads, keys), "gain": (batch, heads, queries)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            last = 1 if name == "bias" else 3  # bias is per key, the others may be the same for all queries
            if value is not None and not _fits(value, shape, broadcast=range(2 if last == 1 else 3)):
                raise ValueError(f"steer.{name} has shape {tuple(value.shape)}, expected {shape} (1 where shared).")
        if self.blend is not None and not _fits(self.blend, (heads,), broadcast=range(1)):
            raise ValueError(f"steer.blend has shape {tuple(self.blend.shape)}, expected ({heads},) or (1,).")
        if self.sigmoid is not None and self.rule is not None:
            raise ValueError("steer.rule redistributes softmax mass; with steer.sigmoid there is none.")
        rule = self.rule
        if rule is None:
            if self.labels is not None or self.spans:
                raise ValueError("steer.labels and steer.spans say where steer.rule applies; there is no rule.")
            return
        if (self.labels is None) == (not self.spans):
            raise ValueError("steer.rule needs either steer.labels or steer.spans.")
        if not 1 <= rule.groups <= MAX_GROUPS:
            raise ValueError(f"steer.rule.keep has {rule.groups} groups; 1 to {MAX_GROUPS} are possible.")
        for name in ("keep", "receive"):
            value = getattr(rule, name)
            if value is not None and not _fits(value, (heads, rule.groups), broadcast=range(1)):
                raise ValueError(
                    f"steer.rule.{name} has shape {tuple(value.shape)}, expected ({heads} or 1, {rule.groups})."
                )
        if rule.renormalise and rule.receive is not None:
            raise ValueError("steer.rule: renormalise shares with everything; receive has no meaning then.")
        if self.labels is not None and not _fits(self.labels, (batch, heads, keys), broadcast=range(2)):
            raise ValueError(f"steer.labels has shape {tuple(self.labels.shape)}, expected {(batch, heads, keys)}.")
        if self.labels is not None and (self.labels.is_floating_point() or self.labels.dtype == torch.bool):
            raise ValueError(f"steer.labels are {self.labels.dtype}; they must be integers, the group of each key.")
        if self.labels is not None and self.labels.device.type == "cpu" and self.labels.numel():
            low, high = int(self.labels.min()), int(self.labels.max())  # on a GPU this would wait for the device
            if low < 0 or high >= rule.groups:
                raise ValueError(f"steer.labels has groups {low} to {high}; the rule has {rule.groups}, from 0.")
        for start, stop, group in self.spans:
            if not (0 <= start <= stop <= keys and 0 <= group < rule.groups):
                raise ValueError(
                    f"steer.spans: ({start}, {stop}, group {group}) is outside {keys} keys or {rule.groups} groups."
                )
        if (rule.tests is None) != (rule.bounds is None):
            raise ValueError("steer.rule.tests and steer.rule.bounds go together.")
        if rule.tests is not None and rule.bounds is not None:
            n = rule.tests.shape[0]
            if not 1 <= n <= MAX_TESTS or tuple(rule.tests.shape) != (n, rule.groups) or rule.bounds.shape != (n,):
                raise ValueError(f"steer.rule.tests must be (1 to {MAX_TESTS}, {rule.groups}), bounds as long.")
        if rule.rows is not None and tuple(rule.rows.shape) != (batch, queries):
            raise ValueError(f"steer.rule.rows has shape {tuple(rule.rows.shape)}, expected {(batch, queries)}.")


def _fits(value: Tensor, shape: tuple[int, ...], broadcast: range) -> bool:
    sizes = enumerate(zip(value.shape, shape, strict=True)) if value.ndim == len(shape) else []
    return value.ndim == len(shape) and all(have == want or (have == 1 and i in broadcast) for i, (have, want) in sizes)


def factors(mass: Tensor, rule: Rule, rows: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """w_g / P_g, (batch, heads, queries, groups), from masses of that shape: A' = A·factor of the key's group.

    Defined where P_g = 0 too. rows (batch, queries) bool overrides rule.rows (a slice of it, say). sink (batch, heads,
    queries, 1): the sink logit's share; if not given 1 − Σ P, which is only rounding where all that is kept is small.
    """
    keep = rule.keep.to(mass)[None, :, None]  # (1, heads or 1, 1, groups)
    kept = (keep * mass).sum(-1, keepdim=True)
    if rule.renormalise:
        total = kept + ((1 - mass.sum(-1, keepdim=True)).clamp_min(0) if sink is None else sink)
        new = torch.where(total > 0, keep / torch.where(total > 0, total, 1), torch.zeros_like(mass))
    elif rule.receive is None:
        new = keep.expand_as(mass)
    else:
        receive = rule.receive.to(mass)[None, :, None]
        shared = (receive * mass).sum(-1, keepdim=True)
        freed = ((1 - keep) * mass).sum(-1, keepdim=True)
        moved = keep + receive * freed / torch.where(shared > NOTHING, shared, 1)
        nobody = (receive == 0).all(-1, keepdim=True)  # this head drops the mass
        new = torch.where((shared > NOTHING) | nobody, moved, torch.ones_like(mass))
    return torch.where(applies(mass, rule, rows), new, torch.ones_like(mass))


def applies(mass: Tensor, rule: Rule, rows: Tensor | None = None) -> Tensor:
    """(batch, heads, queries, 1) bool: rows the rule changes."""
    yes = torch.ones_like(mass[..., :1], dtype=torch.bool)
    if rule.tests is not None and rule.bounds is not None:
        yes = yes & (mass @ rule.tests.to(mass).T >= rule.bounds.to(mass)).all(-1, keepdim=True)
    rows = rule.rows if rows is None else rows
    return yes if rows is None else yes & rows.to(mass.device)[:, None, :, None]
