"""Prompts shuffled so that one thing is no longer true of them: the controls of methods that read
them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy as np

from interp.circuits.runs.prompts import Prompts
from interp.errors import InputError
from interp.tasks.task import Instance

#: what may be shuffled, and what then no longer holds
KINDS = {
    "labels": "the right and wrong answers of one prompt are another's",
    "pairs": "the corrupted twin of one prompt is another's",
    "sides": "in half of the pairs, clean and corrupted change places",
}


def shuffled(prompts: Prompts, kind: str, seed: int) -> Prompts:
    """The same prompts with one thing shuffled: a derangement, among prompts of one form.

    kind:
        "labels": accept and wrong, so that the metric asks for an answer that the prompt does not
        call for. "pairs": the corrupted ids. "sides": ids and corrupted ids change places in a
        random half.

    Raises `InputError` where nothing can be shuffled: prompts all of different lengths.

    Example:
        >>> from interp.circuits.benching.shuffling import shuffled
        >>> prompts = interp.circuits.prompts.from_task(model, "ioi", 6)
        >>> other = shuffled(prompts, "pairs", seed=0)
        >>> sorted(i.corrupted for i in other.instances) == sorted(
        ...     i.corrupted for i in prompts.instances
        ... )
        True
    """
    rng = np.random.default_rng([seed, len(prompts)])
    own = prompts.instances
    if kind == "sides":
        swap = np.zeros(len(own), dtype=bool)
        swap[rng.permutation(len(own))[: len(own) // 2]] = True
        made = [
            replace(i, ids=i.corrupted, corrupted=i.ids) if s else i
            for i, s in zip(own, swap, strict=True)
        ]
        return replace(prompts, instances=tuple(made))
    if kind == "labels":
        donors = _deranged(own, lambda i: tuple(map(bool, i.wrong)), rng, kind)
        made = [
            replace(i, accept=own[d].accept, wrong=own[d].wrong)
            for i, d in zip(own, donors, strict=True)
        ]
    elif kind == "pairs":
        donors = _deranged(own, lambda i: len(i.ids), rng, kind)
        made = [replace(i, corrupted=own[d].corrupted) for i, d in zip(own, donors, strict=True)]
    else:
        raise InputError(f"What can be shuffled is {', '.join(KINDS)}, not {kind!r}.")
    return replace(prompts, instances=tuple(made))


def _deranged(
    instances: tuple[Instance, ...],
    form: Callable[[Instance], Hashable],
    rng: np.random.Generator,
    kind: str,
) -> np.ndarray:
    """(n,): for each instance the number of another of the same form; itself where it is alone.
    Each group is rotated in a random order, so that no instance keeps its own."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, instance in enumerate(instances):
        groups[form(instance)].append(n)
    donors = np.arange(len(instances))
    for members in groups.values():
        order = rng.permutation(members)
        donors[order] = np.roll(order, 1)
    moved = int((donors != np.arange(len(instances))).sum())
    if moved < len(instances) / 2:
        raise InputError(
            f"Only {moved} of {len(instances)} prompts have another of their form, so their {kind} "
            "can't be shuffled; use more prompts."
        )
    return donors
