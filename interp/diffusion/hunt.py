"""HeadHunter in a sampling loop: heads whose guidance gives the pictures that an objective asks
for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calibration.greedy import greedy
from interp.errors import InputError
from interp.evaluation.ablation import controls
from interp.support.progress import Progress, reporting
from interp.support.statistics import Interval, bootstrap
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.edit import Edit

#: (edits, seed) → a number for each picture that is drawn with them
Objective = Callable[[Sequence["Edit"], int], Sequence[float]]


@dataclass(frozen=True)
class Hunt:
    """The `heads` found, and what they do on pictures of other noise.

    trials: a row a trial. untouched: (pictures,) the objective without edits, on held-out noise;
    gain: of the heads found, paired with it; random: (draws,) mean gains of as many random heads of
    the same layers; notes: sentences for the user.

    Example:
        >>> from interp.support.statistics import bootstrap
        >>> gain, random = bootstrap([0.4, 0.6, 0.5]), np.array([0.1, -0.2])
        >>> interp.diffusion.Hunt([], None, np.zeros(3), gain, random, []).beats_random
        True
        >>> interp.diffusion.Hunt([], None, np.zeros(3), gain, random + 0.5, []).beats_random
        False
    """

    heads: list[Head]
    trials: pd.DataFrame
    untouched: np.ndarray
    gain: Interval
    random: np.ndarray
    notes: list[str]

    @property
    def beats_random(self) -> bool:
        """Whether the gain is above 0, and above that of every draw of random heads."""
        above = len(self.random) > 0 and bool((self.gain.mean > self.random).all())
        return self.gain.low > 0 and above


@reporting("Hunting heads")
def hunt(
    model: Any,
    objective: Objective,
    rounds: int = 2,
    top: int = 1,
    using: Callable[[tuple[Head, ...]], Sequence[Edit]] | None = None,
    draws: int = 10,
    held_out: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Hunt:
    """Chooses heads greedily by what is drawn under them, and judges them beside random ones.

    HeadHunter (Ahn et al. 2025, arXiv 2506.10978): every head is tried, the `top` best join, and
    again with those chosen. The paper's objectives are human preference and style; any will do.

    Args:
        model: a diffusion model as a `HookedModel`, or what `interp.load` takes.
        objective: (edits, seed) → a number for each picture, to be made large; it draws with the
            edits, as perturbation (`draw(…, edits=edits, weight=…)`) or in a block of `model.edit`.
        rounds, top: at most that many rounds, heads a round.
        using: heads → edits; None for `SoftPAG` with u = 1.
        draws: of as many other heads of the same layers, for the control.
        held_out: how many other seeds the heads found are judged on.
        seed: of the trials, of the first held-out seed (the next one), and of the random heads.
        progress: True for a bar, or a function (done, total, what).

    Misleads:
        The best of many trials looks good by chance: read `gain`, of noise that was not hunted on,
        beside `random`. More dots, or more colour, is not a better picture.

    Raises:
        InputError: options out of range, or an objective that gives no numbers.

    Example:
        >>> dit = interp.load("dit")
        >>> red = {"class_labels": torch.zeros(2, dtype=torch.int64)}
        >>> def redness(edits, seed):
        ...     drawn = interp.diffusion.draw(dit, red, edits=edits, weight=1.0, steps=2, seed=seed)
        ...     return drawn[:, 0].mean((1, 2)).tolist()
        >>> found = interp.diffusion.hunt(dit, redness, rounds=1, draws=2, held_out=1)
        >>> len(found.trials), len(found.random)
        (36, 2)
    """
    import pandas as pd

    from interp.edits.soft_pag import SoftPAG
    from interp.loading import load

    if min(rounds, top, draws, held_out) < 1:
        raise InputError("Rounds, top, draws and held_out of a hunt are at least 1.")
    hooked = load(model)
    make = (lambda heads: [SoftPAG(1.0, heads)]) if using is None else using
    total = 1 + rounds * len(hooked.heads) + held_out * (2 + draws)
    done = 0

    def judged(heads: Sequence[Head], at: int, what: str) -> np.ndarray:
        nonlocal done
        edits = list(make(tuple(heads))) if heads else []
        values = np.asarray(objective(edits, at), dtype=np.float64).ravel()
        done += 1
        if progress is not None:
            progress(min(done, total), total, what)
        if not values.size or not np.isfinite(values).all():
            raise InputError(
                f"The objective gave {values.tolist()[:3]} with {what}; it must give a finite "
                "number for each picture."
            )
        return values

    def score(name: str, heads: list[Head]) -> float:
        return float(judged(heads, seed, " ".join(map(str, heads))).mean())

    best = float(judged([], seed, "nothing edited").mean())
    found = greedy(hooked.heads, score, best, rounds=rounds, top=top)
    seeds = range(seed + 1, seed + 1 + held_out)
    plain = np.concatenate([judged([], s, "nothing edited, held out") for s in seeds])
    notes: list[str] = []
    if found.heads:
        with_heads = np.concatenate([judged(found.heads, s, "the heads, held out") for s in seeds])
        rng = np.random.default_rng(seed)
        random = []
        for i in range(draws):
            others = controls(hooked, found.heads, (), rng)
            if not others:
                notes.append("There are too few other heads for a control.")
                break
            values = [judged(others, s, f"random heads {i + 1}") for s in seeds]
            random.append(float((np.concatenate(values) - plain).mean()))
        gain = bootstrap((with_heads - plain).tolist(), seed)
    else:
        notes.append("No head raises the objective.")
        gain, random = Interval(0.0, 0.0, 0.0, len(plain)), []
    return Hunt(found.heads, pd.DataFrame(found.rows), plain, gain, np.array(random), notes)
