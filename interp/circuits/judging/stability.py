"""How much a circuit depends on the prompts that it was found on."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.circuits.judging.agreement import Stability, stability
from interp.circuits.methods.catalogue import as_method
from interp.circuits.methods.circuit_method import Method
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.errors import InputError
from interp.inputs.text import check_seed
from interp.support.progress import Shown, reporting
from interp.tasks.task import Task


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
