"""The truth by brute force: the heads whose mean ablation a task feels, on prompts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from interp.circuits.finding import find
from interp.circuits.known.truth import Truth
from interp.errors import InputError
from interp.support.progress import Shown, reporting
from interp.support.statistics import resampled_means
from interp.tasks.task import Task
from interp_hooks.heads import Head

#: a head counts from this share of the metric's range
SHARE = 0.02
#: added to the seed, so that no method sees these prompts
APART = 3 << 20


@reporting("Measuring the circuit")
def measured(
    model: Any,
    task: str | Task,
    n: int = 1024,
    seed: int = 0,
    mode: str = "mean",
    share: float = SHARE,
    progress: Shown = None,
    resume: str | Path | None = None,
) -> Truth:
    """The heads that matter for a task by exhaustive ablation, one pass a head.

    A head is in the circuit when the effect of replacing its z (by its mean over the corrupted
    prompts, by default) is significant (the 95 % bootstrap interval over prompts leaves 0 out) and
    at least `share` of the metric, that is of |m(clean)|, or of |m(clean) − m(corrupted)| where
    that is more (a log-probability is near 0 on solved prompts). Its class is "helps" or "hinders";
    effects are shares of the same. Prompts are drawn far from those of `find` with any usual seed.

    Effects that change sign from prompt to prompt need many prompts: their mean is small and their
    spread is not.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, or a task with settings of its own.
        n: pairs of prompts.
        seed: of the prompts.
        mode: what takes a head's place: "mean", "resample", "zero" or "optimal" (see
            `head_ablation`). Which heads matter depends on it: report more than one.
        share: of the metric, from which an effect counts.
        progress: True for a bar with the time left, or a function (done, total, what).
        resume: a folder in which finished heads are kept until the end, so that an interrupted
            measurement resumes.

    Returns:
        A `Truth`, to compare found circuits with.

    Raises:
        InputError: the model can't do the task, or no head matters; and as `find`.

    Example:
        >>> truth = interp.circuits.measured(model, "ioi", n=16)
        >>> set(truth.heads.values()) <= {"helps", "hinders"}
        True
    """
    circuit = find(
        model, task, "head_ablation", n, seed + APART, mode=mode, progress=progress, resume=resume
    )
    effects = circuit.effects
    assert effects is not None
    clean, corrupted = circuit.search.clean.mean, circuit.search.corrupted.mean
    size = max(abs(clean), abs(clean - corrupted))
    low, high = np.quantile(resampled_means(effects, seed), [0.025, 0.975], axis=1)
    mean = effects.mean(1)
    inside = ((low > 0) | (high < 0)) & (np.abs(mean) >= share * size)
    heads = [
        Head(int(layer), int(head))
        for layer, head in zip(circuit.frame["layer"], circuit.frame["head"], strict=True)
    ]
    if not inside.any():
        raise InputError(
            f"No head of {circuit.model} matters for {circuit.task} by itself, so there is no "
            "circuit of heads."
        )
    return Truth(
        circuit.task,
        {
            h: "helps" if m > 0 else "hinders"
            for h, m, i in zip(heads, mean, inside, strict=True)
            if i
        },
        int(circuit.frame["layer"].max()) + 1,
        int(circuit.frame["head"].max()) + 1,
        f"exhaustive {mode} ablation, {n} prompts, seed {seed}: significant (95 %), at least "
        f"{share:.0%} of the metric",
        circuit.model,
        {h: round(float(m / size), 5) for h, m in zip(heads, mean, strict=True)},
    )
