"""How much a circuit depends on the prompts that it was found on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from interp.circuits.methods.catalogue import as_method
from interp.circuits.methods.circuit_method import Method
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.errors import InputError
from interp.inputs.text import check_seed
from interp.support.progress import Shown, reporting
from interp.tasks.task import Task
from interp_hooks.heads import parse_heads

#: Méloux et al.'s bar for reporting a circuit: mean Jaccard, and resamples
BAR, RESAMPLES = 0.8, 100


def jaccard(a: Iterable[Any], b: Iterable[Any]) -> float:
    """|a ∩ b| / |a ∪ b| of two sets of heads in any spelling; 1 where both are empty."""
    one, other = set(parse_heads(a)), set(parse_heads(b))
    return len(one & other) / len(one | other) if one | other else 1.0


@dataclass(frozen=True)
class Stability:
    """Mean Jaccard overlap over all pairs of `n` circuits, and the 2.5 % and 97.5 % quantiles over
    the pairs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def reportable(self) -> bool:
        """Whether it passes the bar of Méloux et al. (§6.2): a mean of 0.8 or more over 100
        resamples or more."""
        return self.mean >= BAR and self.n >= RESAMPLES

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.n} resamples"


def stability(top_sets: Iterable[Iterable[Any]]) -> Stability:
    """How much circuits found on bootstrap resamples agree. Raises `InputError` for fewer than
    two."""
    sets = [frozenset(parse_heads(s)) for s in top_sets]
    if len(sets) < 2:
        raise InputError(f"Stability compares circuits of two or more resamples, not {len(sets)}.")
    overlaps = [jaccard(a, b) for a, b in combinations(sets, 2)]
    low, high = np.quantile(overlaps, [0.025, 0.975])
    return Stability(float(np.mean(overlaps)), float(low), float(high), len(sets))


@reporting("Resampling")
def resampled(
    model: Any,
    task: str | Task | Prompts,
    method: str | Method,
    k: int,
    resamples: int = 100,
    n: int = 128,
    seed: int = 0,
    progress: Shown = None,
    **settings: Any,
) -> Stability:
    """Stability of a circuit: mean Jaccard overlap of its k strongest heads over resamples.

    The prompts are resampled (bootstrap). A circuit is worth reporting from .8 over 100 resamples
    (Méloux et al., section 6.2; `Stability.reportable`).

    Args:
        model, task, method, n, seed, settings: as in `find`.
        k: how many heads.
        resamples: of the prompts, at least two.
        progress: True for a bar with the time left, or a function (done, total, what).

    Returns:
        A `Stability`: the mean overlap over all pairs, and its 2.5 % and 97.5 % quantiles.

    Raises:
        InputError: as `find`, and for fewer than two resamples or a `k` that the model has not.

    Example:
        >>> found = interp.circuits.resampled(model, "ioi", "eap", k=3, resamples=2, n=8)
        >>> 0 <= found.mean <= 1
        True
    """
    from interp.loading import load

    check_seed(seed)
    searcher = as_method(method, None, settings)
    hooked = load(model)
    prompts = task if isinstance(task, Prompts) else from_task(hooked, task, n, seed)
    rng = np.random.default_rng([seed, resamples])
    sets = []
    with hooked.clean():
        for done in range(resamples):
            rows = rng.integers(0, len(prompts), len(prompts))
            runs = PairedRuns(
                hooked, Prompts(prompts.task, tuple(prompts.instances[i] for i in rows)), seed
            )
            if not 1 <= k < len(runs.heads):
                raise InputError(
                    f"{hooked.name} has {len(runs.heads)} heads; stability of the top {k} says "
                    "nothing."
                )
            score = searcher.find(runs).score
            strongest = np.argsort(-score, kind="stable")[:k]
            sets.append([runs.heads[i] for i in strongest])
            if progress is not None:
                progress(done + 1, resamples, f"resample {done + 1}")
    return stability(sets)
