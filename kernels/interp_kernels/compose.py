"""Several edits of one call as few: rules over common groups of keys, tempers, biases and gains
combined.

Two rules over groups of their own are rules over the common refinement, whose groups are the pairs
(g, h) of a key's groups: every mass a rule asks for is a sum over pairs, P_g = Σ_h P_(g,h), and its
factor for a pair is that of its own part. So `keep`, `receive` and the columns of `tests` are
spread over the pairs, and nothing else changes. A rule that gives a group a least mass is no sum:
it stays an edit of its own where pairs would split its groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .masking import bias_visible
from .request import Request
from .steer import MAX_GROUPS, Rule, Steer, segments

#: One edit, several in their order, or none.
Steers = Steer | Sequence[Steer] | None


def as_steers(steer: Steers) -> tuple[Steer, ...]:
    """In their order, those that change nothing left out."""
    if steer is None:
        return ()
    if isinstance(steer, Steer):
        return (steer,) if steer else ()
    return tuple(one for one in steer if one)


def check(steer: Steers, batch: int, heads: int, queries: int, keys: int) -> None:
    """Raise `ValueError` naming the edit and the field that does not fit."""
    if steer is None:
        return None
    if isinstance(steer, Steer):
        return steer.check(batch, heads, queries, keys)
    for i, one in enumerate(steer):
        try:
            one.check(batch, heads, queries, keys)
        except ValueError as error:
            raise ValueError(f"Edit {i + 1}: {error}") from None
    return _check_sigmoid(as_steers(steer))


def _check_sigmoid(steers: Sequence[Steer]) -> None:
    weighs = [
        s for s in steers if s.sigmoid is not None or s.rule is not None or s.blend is not None
    ]
    if len(weighs) > 1 and any(s.sigmoid is not None for s in weighs):
        raise ValueError(
            "steer.sigmoid stands in for the softmax; no other edit may change weights beside it."
        )


def refuse(steers: Sequence[Steer], sinks: Tensor | None, request: Request) -> None:
    """Raise `ValueError` for what has no meaning without a softmax."""
    if all(one.sigmoid is None for one in steers):
        return
    if sinks is not None:
        raise ValueError(
            "Sink logits are a share of the softmax; with steer.sigmoid there is none."
        )
    if request:
        raise ValueError(
            "Under steer.sigmoid weights are no distribution; there are no statistics of them."
        )
    _check_sigmoid(steers)


def fuse(steer: Steers, keys: int, device: torch.device | None = None) -> tuple[Steer, ...]:
    """The same edits as few: () for none, mostly one.

    What is left of several: the first alone has temper, bias and sigmoid, the last alone a gain,
    and all but the last have a blend (a rule after a blend needs the blended weights) or, with the
    next one, more than 256 groups or groups that a least mass does not let split. Group 0 of a
    result is where all its rules have group 0. Spans stay spans among themselves; with labels they
    become labels. Nothing waits for a GPU. device: where tensors of several edits are brought
    together.
    """
    steers = tuple(one.wide() for one in as_steers(steer))
    if len(steers) < 2:
        return steers
    if device is not None:
        steers = tuple(one.to(device) for one in steers)
    _check_sigmoid(steers)
    done: list[Steer] = []
    for one in steers:
        part = Steer(
            sigmoid=one.sigmoid, labels=one.labels, spans=one.spans, rule=one.rule, blend=one.blend
        )
        if not part:
            continue
        both = _joined(done[-1], part, keys) if done else None
        if both is None:
            done.append(part)
        else:
            done[-1] = both
    done = done or [Steer()]
    done[0] = replace(
        done[0], temper=_product([s.temper for s in steers]), bias=_sum([s.bias for s in steers])
    )
    done[-1] = replace(done[-1], gain=_product([s.gain for s in steers]))
    return tuple(done)


def _product(given: Sequence[Tensor | None]) -> Tensor | None:
    made: Tensor | None = None
    for one in given:
        if one is not None:
            made = one if made is None else made * one
    return made


def _sum(given: Sequence[Tensor | None]) -> Tensor | None:
    """Biases added; −inf where any of them hides the key."""
    found = [one for one in given if one is not None]
    if len(found) < 2:
        return found[0] if found else None
    dtype = torch.float32
    for one in found:
        dtype = torch.promote_types(dtype, one.dtype)
    kept = [bias_visible(one) for one in found]
    total, seen = torch.where(kept[0], found[0], 0).to(dtype), kept[0]
    for one, visible in zip(found[1:], kept[1:], strict=True):
        total, seen = total + torch.where(visible, one, 0).to(dtype), seen & visible
    return torch.where(seen, total, -torch.inf)


def _joined(a: Steer, b: Steer, keys: int) -> Steer | None:
    """a, then b as one (rules and blends alone); None where they cannot be."""
    if b.rule is None:  # (1 − u)·((1 − t)·A + t·I) + u·I
        blend = (
            b.blend if a.blend is None or b.blend is None else a.blend + b.blend - a.blend * b.blend
        )
        return replace(a, blend=blend)
    if a.blend is not None:
        return None
    refined = _refined(a, b, keys)
    if refined is None:
        return None
    where, pairs = refined
    of_a, of_b = [g for g, _ in pairs], [h for _, h in pairs]
    if _splits(a.rules, of_a) or _splits(b.rules, of_b):
        return None
    rules = [_spread(rule, of_a) for rule in a.rules] + [_spread(rule, of_b) for rule in b.rules]
    return Steer(rule=tuple(rules), blend=b.blend, **where)


def _splits(rules: Sequence[Rule], groups: list[int]) -> bool:
    """Whether a group whose mass some rule takes to a least one would be several."""
    raises = any(rule.renormalise and rule.receive is not None for rule in rules)
    return raises and len(set(groups)) < len(groups)


def _refined(a: Steer, b: Steer, keys: int) -> tuple[dict[str, Any], list[tuple[int, int]]] | None:
    """Where the common groups of two edits with rules are (labels or spans), and the pair (a's
    group, b's group) each of them is; None if there are too many. Every group of a and of b is in
    some pair, even if no key has it: whether a rule has receivers at all is asked of all its
    groups."""
    if a.labels is not None and a.labels is b.labels:
        largest = max(a.groups, b.groups)
        return {"labels": a.labels}, [
            (min(g, a.groups - 1), min(g, b.groups - 1)) for g in range(largest)
        ]
    if a.labels is None and b.labels is None:
        where, pairs = _refined_spans(a, b, keys)
        return None if len(pairs) > MAX_GROUPS else (where, pairs)
    if a.groups * b.groups > MAX_GROUPS:
        return None
    device = next(s.labels.device for s in (a, b) if s.labels is not None)
    labels = a.labels_of(keys, device) * b.groups + b.labels_of(keys, device)
    return {"labels": labels}, [(g, h) for g in range(a.groups) for h in range(b.groups)]


def _refined_spans(a: Steer, b: Steer, keys: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    cuts = [segments(s.spans, keys) for s in (a, b)]
    edges = sorted({edge for cut in cuts for start, stop, _ in cut for edge in (start, stop)})
    pairs, spans = [(0, 0)], []
    for start, stop in itertools.pairwise(edges):
        g, h = (next(g for s, e, g in cut if s <= start < e) for cut in cuts)
        if (g, h) not in pairs:
            pairs.append((g, h))
        if group := pairs.index((g, h)):
            spans.append((start, stop, group))
    absent_a = [g for g in range(a.groups) if g not in {g for g, _ in pairs}]
    absent_b = [h for h in range(b.groups) if h not in {h for _, h in pairs}]
    pairs += [(g, h) for g, h in itertools.zip_longest(absent_a, absent_b, fillvalue=0)]
    return {"spans": tuple(spans) or ((0, 0, 0),)}, pairs


def _spread(rule: Rule, groups: list[int]) -> Rule:
    """The rule where group i stands for its group groups[i]."""

    def over(value: Tensor) -> Tensor:
        return torch.stack(
            [value[..., g] for g in groups], -1
        )  # an index tensor would be copied to the device

    if groups == list(range(rule.groups)):
        return rule
    return replace(
        rule,
        keep=over(rule.keep),
        receive=None if rule.receive is None else over(rule.receive),
        tests=None if rule.tests is None else over(rule.tests),
    )
