"""Edits of one attention call: logits before the softmax, rules over groups of keys after it, gains
on the output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .looking import may_look
from .masking import bias_visible

MAX_GROUPS = 256
MAX_TESTS = 4
#: Receivers that hold less of a row are as good as invisible: dividing by it would overflow
#: float32.
NOTHING = 1e-30


@dataclass(frozen=True)
class Rule:
    """A redistribution of weights between groups of keys, from their masses P_g = Σ_{k in g} A.

        w_g = keep_g·P_g + receive_g·P_g / (Σ_r receive_r·P_r) · Σ_g (1 − keep_g)·P_g
        A' = A·w_g/P_g

    What `keep` takes away is shared out in proportion to receive·P. A row none of whose receivers
    is visible (holds more than 1e-30) stays as it is; without `receive` (or all 0) the mass is
    gone. ACT: keep (1, β), receive (1, 0). A field that does not fit a call is a `ValueError` of
    that call.

    Args:
        keep: (heads or 1, groups) what each group keeps of its mass.
        receive: (heads or 1, groups) in which proportions the groups receive what is freed.
        renormalise: w_g = keep_g·P_g / (Σ keep·P + P_sink), which adds ln keep to the logits. With
            `receive` a group counts at least as much as it says, w_g ∝ max(keep_g·P_g, receive_g),
            where it is visible at all.
        tests: (tests, groups): the rule applies to rows where tests·P ≥ bounds, all of them (VAR's
            portions are linear in P).
        bounds: (tests,).
        rows: (batch, queries) bool: only there.

    Example:
        >>> half = Rule(keep=torch.tensor([[1.0, 0.5]]), receive=torch.tensor([[1.0, 0.0]]))
        >>> factors(torch.tensor([[[[0.2, 0.8]]]]), half).flatten()
        tensor([3.0000, 0.5000])
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

    @property
    def adds_to_logits(self) -> bool:
        """Whether it is ln keep on the logits of every row, whatever the masses are."""
        return self.renormalise and all(t is None for t in (self.receive, self.tests, self.rows))

    def to(self, device: torch.device) -> Rule:
        """The same with its tensors on `device`."""
        names = ("keep", "receive", "tests", "bounds", "rows")
        given = {name: getattr(self, name) for name in names}
        if all(value is None or value.device == device for value in given.values()):
            return self
        moved: dict[str, Any] = {name: _move(value, device) for name, value in given.items()}
        return replace(self, **moved)

    def wide(self) -> Rule:
        """The same with half-precision tensors in float32."""
        given = {name: getattr(self, name) for name in ("keep", "receive", "tests", "bounds")}
        half: dict[str, Any] = {n: value.float() for n, value in given.items() if _is_half(value)}
        return replace(self, **half) if half else self

    def check(self, groups: int, batch: int, heads: int, queries: int) -> None:
        """Raise `ValueError` naming the field that does not fit, or if it has not that many
        groups."""
        own = self.groups
        if not 1 <= own <= MAX_GROUPS:
            raise ValueError(f"steer.rule.keep has {own} groups; 1 to {MAX_GROUPS} are possible.")
        if own != groups:
            raise ValueError(
                f"steer.rule: rules one after the other share their groups; {groups}, {own}."
            )
        for name, value in (("keep", self.keep), ("receive", self.receive)):
            if value is not None and not _fits(value, (heads, own), 1):
                raise ValueError(
                    f"steer.rule.{name} has shape {tuple(value.shape)}, expected ({heads} or 1, "
                    f"{own})."
                )
        self._check_tests()
        if self.rows is not None and tuple(self.rows.shape) != (batch, queries):
            raise ValueError(
                f"steer.rule.rows has shape {tuple(self.rows.shape)}, expected {(batch, queries)}."
            )

    def _check_tests(self) -> None:
        if (self.tests is None) != (self.bounds is None):
            raise ValueError("steer.rule.tests and steer.rule.bounds go together.")
        if self.tests is None or self.bounds is None:
            return
        n = self.tests.shape[0]
        fits = tuple(self.tests.shape) == (n, self.groups) and self.bounds.shape == (n,)
        if not (1 <= n <= MAX_TESTS and fits):
            raise ValueError(
                f"steer.rule.tests must be (1 to {MAX_TESTS}, {self.groups}), bounds as long."
            )


def _is_half(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point() and value.dtype.itemsize < 4


def _move(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


@dataclass(frozen=True)
class Steer:
    """An edit of one attention call: its logits, then its weights, then its output.

    1. logits = temper · softcap(scale·q·k) + bias.
    2. A = softmax, or σ(logits + ``sigmoid``) where that is given (no normalisation; neither rule,
       sinks nor statistics then, and the log-sum-exp is ln Σ_k σ).
    3. ``rule`` over groups of keys.
    4. ``blend``: A ← (1 − u)·A + u·I.
    5. ``gain`` on the output; no part of A.

    The log-sum-exp is that of step 2; statistics are of A after step 4 (counts of queries go by the
    mask alone). A row all of whose keys the bias hides has weights 0 (but for the blend) and
    log-sum-exp −inf. A field that does not fit a call is a `ValueError` of that call.

    Several edits, one after the other: the logits of all of them first (tempers multiply, biases
    add), then each one's steps 3 and 4 in turn on what the one before leaves; gains multiply.
    ``sigmoid`` goes with no other edit's rule, blend or sigmoid.

    Args:
        temper: (batch or 1, heads or 1, queries or 1) inverse temperature.
        bias: (batch or 1, heads or 1, keys), −inf hides a key; ln a multiplies its weight by a and
            renormalises.
        sigmoid: what is added to the logits before σ.
        labels: (batch or 1, heads or 1, keys) ints in 0 … groups − 1, the group of each key.
        spans: in place of labels (start, stop, group) of key columns, known on the host; elsewhere
            group 0. Group 0 owns the main loop of the fused route: give it to most keys.
        rule: one or several, on the same groups, one after the other: each finds the masses, and
            the sink logit's share, as the one before leaves them.
        blend: (heads or 1,) = u, I being the query's own key (SoftPAG); a row that does not see its
            own key by the mask stays as it is.
        gain: (batch or 1, heads or 1, queries or 1).

    Example:
        >>> from interp_kernels import Mask, attention
        >>> q, v = torch.zeros(1, 1, 1, 4), torch.tensor([[[[1.0], [3.0]]]])
        >>> k, hide = torch.zeros(1, 1, 2, 4), torch.tensor([[[-torch.inf, 0.0]]])
        >>> attention(q, k, v, mask=Mask(q_start=1), steer=Steer(bias=hide)).out.flatten()
        tensor([3.])
    """

    temper: Tensor | None = None
    bias: Tensor | None = None
    sigmoid: float | None = None
    labels: Tensor | None = None
    spans: tuple[tuple[int, int, int], ...] = ()
    rule: Rule | tuple[Rule, ...] | None = None
    blend: Tensor | None = None
    gain: Tensor | None = None

    def __bool__(self) -> bool:
        return (
            self.rule is not None
            or self.bias is not None
            or self.temper is not None
            or self.sigmoid is not None
            or self.blend is not None
            or self.gain is not None
        )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """In their order."""
        return as_rules(self.rule)

    @property
    def groups(self) -> int:
        """Groups of keys; 1 without a rule."""
        return self.rules[0].groups if self.rules else 1

    @property
    def tensors(self) -> list[Tensor]:
        """What a gradient may be asked for."""
        found = [self.temper, self.bias, self.blend, self.gain]
        for rule in self.rules:
            found += [rule.keep, rule.receive]
        return [t for t in found if t is not None]

    def to(self, device: torch.device) -> Steer:
        """The same with its tensors on `device`."""
        names = ("temper", "bias", "labels", "blend", "gain")
        moved: dict[str, Any] = {name: _move(getattr(self, name), device) for name in names}
        rules = tuple(rule.to(device) for rule in self.rules)
        return replace(
            self,
            rule=self.rule if self.rule is None else rules[0] if len(rules) == 1 else rules,
            **moved,
        )

    def wide(self) -> Steer:
        """The same with half-precision tensors in float32, so that sums, products and 1 − keep
        lose nothing and what hides a key (in float16 finfo.min and its neighbourhood) is −inf."""
        given = {name: getattr(self, name) for name in ("temper", "bias", "blend", "gain")}
        half = {name: value for name, value in given.items() if _is_half(value)}
        if "bias" in half:
            shown = bias_visible(half["bias"])
            half["bias"] = half["bias"].float().masked_fill(~shown, -torch.inf)
        upcast: dict[str, Any] = {
            name: value if name == "bias" else value.float() for name, value in half.items()
        }
        rules = tuple(rule.wide() for rule in self.rules)
        if any(a is not b for a, b in zip(rules, self.rules, strict=True)):
            upcast["rule"] = rules[0] if len(rules) == 1 else rules
        return replace(self, **upcast) if upcast else self

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
        for name, value, last in (
            ("temper", self.temper, queries),
            ("bias", self.bias, keys),
            ("gain", self.gain, queries),
        ):
            # bias is per key, the others may be the same for all queries
            shared = 2 if name == "bias" else 3
            if value is not None and not _fits(value, (batch, heads, last), shared):
                raise ValueError(
                    f"steer.{name} has shape {tuple(value.shape)}, expected "
                    f"{(batch, heads, last)} (1 where shared)."
                )
        if self.blend is not None and not _fits(self.blend, (heads,), 1):
            raise ValueError(
                f"steer.blend has shape {tuple(self.blend.shape)}, expected ({heads},) or (1,)."
            )
        rules = self.rules
        if self.sigmoid is not None and self.rule is not None:
            raise ValueError(
                "steer.rule redistributes softmax mass; with steer.sigmoid there is none."
            )
        if rules:
            self._check_where(batch, heads, keys)
            for rule in rules:
                rule.check(rules[0].groups, batch, heads, queries)
            self._check_groups(rules[0].groups, keys)
        elif self.rule is not None:
            raise ValueError("steer.rule is an empty sequence; None is no rule.")
        elif self.labels is not None or self.spans:
            raise ValueError(
                "steer.labels and steer.spans say where steer.rule applies; there is no rule."
            )

    def _check_where(self, batch: int, heads: int, keys: int) -> None:
        """The groups are said once, and by labels of the right shape and type."""
        labels = self.labels
        if (labels is None) == (not self.spans):
            raise ValueError("steer.rule needs either steer.labels or steer.spans.")
        if labels is None:
            return
        if not _fits(labels, (batch, heads, keys), 2):
            raise ValueError(
                f"steer.labels has shape {tuple(labels.shape)}, expected {(batch, heads, keys)}."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"steer.labels are {labels.dtype}; they must be integers, the group of each key."
            )

    def _check_groups(self, groups: int, keys: int) -> None:
        """No key is in a group that the rule does not have."""
        labels = self.labels
        # on a GPU this would wait for the device
        if labels is not None and may_look(labels.device) and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= groups:
                raise ValueError(
                    f"steer.labels has groups {low} to {high}; the rule has {groups}, from 0."
                )
        for start, stop, group in self.spans:
            if not (0 <= start <= stop <= keys and 0 <= group < groups):
                raise ValueError(
                    f"steer.spans: ({start}, {stop}, group {group}) is outside {keys} keys or "
                    f"{groups} groups."
                )


def _fits(value: Tensor, shape: tuple[int, ...], shared: int) -> bool:
    """The value has the shape, or 1 in some of its first `shared` dimensions."""
    have = value.shape
    if have == shape:
        return True
    if len(have) != len(shape):
        return False
    return all(
        n == want or (n == 1 and i < shared)
        for i, (n, want) in enumerate(zip(have, shape, strict=True))
    )


def segments(spans: tuple[tuple[int, int, int], ...], keys: int) -> list[tuple[int, int, int]]:
    """(start, stop, group) of consecutive key columns, all of 0:keys, neighbours in different
    groups. Later spans win where spans overlap, and group 0 has the rest."""
    if len(spans) == 1:
        start, stop, group = spans[0]
        start, stop = min(start, keys), min(stop, keys)
        if start >= stop or group == 0:
            return [(0, keys, 0)] if keys else []
        cut = ((0, start, 0), (start, stop, group), (stop, keys, 0))
        return [one for one in cut if one[0] < one[1]]
    edges = sorted({0, keys} | {min(edge, keys) for span in spans for edge in span[:2]})
    found: list[tuple[int, int, int]] = []
    for a, b in itertools.pairwise(edges):
        group = next((g for start, stop, g in reversed(spans) if start <= a < stop), 0)
        if found and found[-1][2] == group:
            a = found.pop()[0]
        found.append((a, b, group))
    return found


def as_rules(rule: Rule | Sequence[Rule] | None) -> tuple[Rule, ...]:
    """None, one rule or several, as several."""
    return () if rule is None else (rule,) if isinstance(rule, Rule) else tuple(rule)


def factors(mass: Tensor, rule: Rule | Sequence[Rule], sink: Tensor | None = None) -> Tensor:
    """w_g / P_g, (batch, heads, queries, groups), from masses of that shape: A' = A·factor of the
    key's group. Several rules: the product of their factors f, each of P ← P·f as the one before
    leaves it.

    Defined where P_g = 0 too. sink (batch, heads, queries, 1): the sink logit's share; if not given
    1 − Σ P, which is only rounding where all that is kept is small.
    """
    return share_out(mass, rule, sink)[0]


def share_out(
    mass: Tensor, rule: Rule | Sequence[Rule], sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`factors`, and the sink logit's share (batch, heads, queries, 1) after the rules: only
    renormalising moves it."""
    if sink is None:
        sink = (1 - mass.sum(-1, keepdim=True)).clamp_min(0)
    made: Tensor | None = None
    for one in as_rules(rule):
        factor, left = _factors(mass if made is None else mass * made, one, sink)
        made = factor if made is None else made * factor
        sink = sink if left is None else sink * left
    return torch.ones_like(mass) if made is None else made, sink


def _factors(mass: Tensor, rule: Rule, sink: Tensor) -> tuple[Tensor, Tensor | None]:
    """The factors of one rule, and the sink logit's, None for 1."""
    keep = _like(rule.keep, mass).unsqueeze(1)  # (heads or 1, 1, groups)
    left = None
    if rule.renormalise:
        if rule.receive is not None:
            least = _like(rule.receive, mass).unsqueeze(1)
            seen = mass > NOTHING
            keep = torch.where(seen, torch.maximum(keep, least / mass.where(seen, 1)), keep)
        total = (keep * mass).sum(-1, keepdim=True) + sink
        some = total > 0
        safe = torch.where(some, total, 1)
        new = torch.where(some, keep / safe, torch.zeros_like(mass))
        left = torch.ones_like(sink) / safe
    elif rule.receive is None:
        new = keep.expand_as(mass)
    else:
        receive = _like(rule.receive, mass).unsqueeze(1)
        shared = (receive * mass).sum(-1, keepdim=True)
        freed = ((1 - keep) * mass).sum(-1, keepdim=True)
        held = shared > NOTHING
        lacking = ~held
        moved = keep + receive * freed / shared.masked_fill(lacking, 1.0)
        somebody = receive.any(-1, keepdim=True)  # else this head drops the mass
        new = moved.masked_fill(lacking & somebody, 1.0)
    if rule.tests is None and rule.rows is None:  # every row
        return new, left
    here = applies(mass, rule)
    return torch.where(here, new, 1), None if left is None else torch.where(here, left, 1)


def _like(value: Tensor, other: Tensor) -> Tensor:
    """`value.to(other)`, which costs as much as a small operation where it does nothing."""
    same = value.dtype == other.dtype and value.device == other.device
    return value if same else value.to(other)


def applies(mass: Tensor, rule: Rule) -> Tensor:
    """(batch, heads, queries, 1) bool: rows the rule changes."""
    yes = torch.ones_like(mass[..., :1], dtype=torch.bool)
    if rule.tests is not None and rule.bounds is not None:
        yes = yes & (mass @ rule.tests.to(mass).T >= rule.bounds.to(mass)).all(-1, keepdim=True)
    return yes if rule.rows is None else yes & rule.rows.to(mass.device)[:, None, :, None]
