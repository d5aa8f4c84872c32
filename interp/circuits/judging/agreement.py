"""How well a ranking of heads finds a known circuit: ROC, average precision, precision at k; and
curves of circuits.

Ties are never broken by chance: ROC and average precision take tied heads together, precision and
recall at k are the expected values under a random order among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.circuits.judging.alignment import aligned
from interp.errors import InputError, OutputError
from interp.inputs.text import check_seed
from interp.support import typed
from interp.support.files import check_writable, write_atomic
from interp.support.json_text import parse
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    from interp.results.circuit_table import CircuitTable

__all__ = [
    "Agreement",
    "Stability",
    "compare",
    "curve_areas",
    "evaluate",
    "jaccard",
    "precision_at",
    "ranks",
    "roc",
    "stability",
]

AT = (1, 3, 5, 10)
PERMUTATIONS = 2000
#: Méloux et al.'s bar for reporting a circuit: mean Jaccard, and resamples
BAR, RESAMPLES = 0.8, 100


#: what `Agreement.save` writes
FILE = "agreement.json"


@dataclass(frozen=True)
class Agreement:
    """The agreement of a ranking of heads with a known circuit: AUC, precision, recall, p.

    * `truth`: the circuit's name; `n_heads`, of which `n_positive` are in it; `notes` beside the
      numbers.
    * `auc`: area under the ROC curve by the trapezoid rule, ties together: P[positive above
      negative] + ½ P[tie].
    * `auc_pessimistic`: ACDC's (arXiv 2304.14997, `pessimistic_auc`), steps instead of slopes: Σ (1
      − FPR_i) (TPR_i − TPR_{i−1}) over the thresholds, P[positive above negative]. The two differ
      by half the ties. (ACDC sums over the thresholds that were run, where points between them are
      lost; here every score is a threshold.)
    * `average_precision`: Σ precision_i (recall_i − recall_{i−1}) over the thresholds. `chance`:
      what it tends to for a random ranking, the share of positives.
    * `precision`, `recall`: k → of the k highest; k is 1, 3, 5, 10 and n_positive, as far as there
      are heads.
    * `p`: share of random circuits of the same size, `PERMUTATIONS` seeded draws and this one, with
      an AUC as high.

    Example:
        >>> scores = np.array([[0.9, 0.1], [0.2, 0.8]])
        >>> found = interp.circuits.evaluate(scores, ["L0H0", "L1H0"])
        >>> found.auc, found.precision[1]
        (0.75, 1.0)
    """

    auc: float
    auc_pessimistic: float
    average_precision: float
    precision: dict[int, float]
    recall: dict[int, float]
    n_positive: int
    n_heads: int
    truth: str
    chance: float
    p: float

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `agreement.json` into a folder; returns its path.

        Raises:
            OutputError: it can't be written.
        """
        check_writable(folder)
        path = Path(folder) / FILE
        write_atomic(
            path,
            (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode(
                errors="backslashreplace"
            ),
        )
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Agreement:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing or damaged.
        """
        path = Path(folder) / FILE
        try:
            said = parse(path.read_text(encoding="utf-8"))
            for name in ("precision", "recall"):  # JSON has text for keys
                said[name] = {int(k): value for k, value in said[name].items()}
            return typed.made(cls, {**said, "notes": tuple(typed.texts(said.get("notes", [])))})
        except FileNotFoundError as error:
            raise OutputError(f"There is no agreement in {folder} ({FILE} is missing).") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{path} is damaged ({error}); compare again.") from error

    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row: `truth`, `n_positive`, `n_heads`, `auc`, …, and `precision_at_K`, `recall_at_K`.

        Example:
            >>> frame = interp.circuits.evaluate(circuit, ["L2H3", "L3H1"]).to_frame()
            >>> len(frame), int(frame["n_positive"][0])
            (1, 2)
        """
        row: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "truth",
                "n_positive",
                "n_heads",
                "auc",
                "auc_pessimistic",
                "average_precision",
                "chance",
                "p",
            )
        }
        row |= {f"precision_at_{k}": value for k, value in self.precision.items()}
        row |= {f"recall_at_{k}": value for k, value in self.recall.items()}
        return pd.DataFrame([row])

    def __repr__(self) -> str:
        at = ", ".join(f"{k}: {value:.2f}" for k, value in self.precision.items())
        return (
            f"Agreement({self.truth}, {self.n_positive} of {self.n_heads} heads: AUC "
            f"{self.auc:.3f} "
            f"(pessimistic {self.auc_pessimistic:.3f}, p = {self.p:.2g}), average precision "
            f"{self.average_precision:.3f} (chance {self.chance:.3f}), precision at {at})"
        )


def evaluate(scores: Any, truth: Any, seed: int = 0, *, column: str | None = None) -> Agreement:
    """Agreement of scores, higher meaning more in the circuit, with a known circuit.

    Args:
        scores: a (layers, heads) array; a dict, head → score; a DataFrame with `layer`, `head` and
            one more column, or `column`; or what has such a `frame` and a `column` (a found
            circuit).
        truth: a `Truth`; heads in any spelling; or the name of a published circuit, "ioi".
        seed: of the random circuits behind `p`.
        column: of a DataFrame, the column of the scores.

    Returns:
        An `Agreement`: AUC, average precision, precision and recall, p.

    Raises:
        InputError: heads without a score or with NaN, another number of layers or heads, no head or
            all heads in the circuit, a truth that lists only the strongest heads (see
            `precision_at`, `ranks`).
        HeadError, UnknownNameError: heads or a name that can't be read.

    Example:
        >>> interp.circuits.evaluate(np.array([[0.9, 0.1], [0.2, 0.8]]), ["L0H0", "L1H1"]).auc
        1.0
    """
    check_seed(seed)
    target, values, positives = aligned(scores, truth, column)
    if not target.complete:
        raise InputError(
            f"The circuit {target.name} lists only its {len(target.heads)} strongest heads, so ROC "
            "and recall are not "
            "defined; use precision_at for small k, or ranks."
        )
    _two_sided(positives)
    fpr, tpr, _ = roc(values, positives)
    n, n_positive = len(values), int(positives.sum())
    hits, false_hits = (
        np.rint(tpr * n_positive),
        np.rint(fpr * (n - n_positive)),
    )  # counts at each threshold: areas come out exact
    pairs = n_positive * (n - n_positive)
    at = [k for k in sorted({*AT, n_positive}) if k <= n]
    expected = {k: _hits(values, positives, k) for k in at}
    return Agreement(
        auc=float(np.sum(np.diff(false_hits) * (hits[1:] + hits[:-1]) / 2) / pairs),
        auc_pessimistic=float(np.sum((n - n_positive - false_hits[1:]) * np.diff(hits)) / pairs),
        average_precision=float(np.sum(np.diff(tpr) * hits[1:] / (hits[1:] + false_hits[1:]))),
        precision={k: expected[k] / k for k in at},
        recall={k: expected[k] / n_positive for k in at},
        n_positive=n_positive,
        n_heads=n,
        truth=target.name,
        chance=n_positive / n,
        p=_p_value(values, positives, seed),
        notes=target.notes,
    )


def compare(circuits: Sequence[CircuitTable], truth: Any, seed: int = 0) -> pd.DataFrame:
    """The agreement of found circuits with a known one, a row a circuit, the best AUC first.

    Args:
        circuits: found circuits.
        truth: as in `evaluate`.
        seed: of the random circuits behind `p`.

    Returns:
        Columns `method`, `auc`, `auc_pessimistic`, `average_precision`, `p`, `forwards`,
        `backwards` (passes over the prompts) and `seconds`.

    Raises:
        InputError, HeadError, UnknownNameError: as `evaluate`.

    Example:
        >>> interp.circuits.compare([circuit], ["L2H3", "L3H1"])["method"].tolist()
        ['head_ablation']
    """
    rows = []
    for circuit in circuits:
        agreement, search = evaluate(circuit, truth, seed), circuit.search
        scores = {
            k: getattr(agreement, k) for k in ("auc", "auc_pessimistic", "average_precision", "p")
        }
        took = {k: getattr(search, k) for k in ("forwards", "backwards", "seconds")}
        rows.append({"method": search.method, **scores, **took})
    return pd.DataFrame(rows).sort_values("auc", ascending=False, kind="stable", ignore_index=True)


def precision_at(scores: Any, truth: Any, k: int, *, column: str | None = None) -> float:
    """Share of the circuit's heads among the k highest scores, ties in random order.

    Where the truth lists only the strongest heads, this is a lower bound, and `k` at most their
    number.

    Args:
        scores, truth, column: as in `evaluate`.
        k: how many of the highest scores.

    Raises:
        InputError: as `evaluate`, and for a `k` outside that range.

    Example:
        >>> interp.circuits.precision_at(np.array([[0.9, 0.1], [0.2, 0.8]]), ["L0H0", "L1H0"], k=2)
        0.5
    """
    target, values, positives = aligned(scores, truth, column)
    most = len(values) if target.complete else len(target.heads)
    if not 1 <= k <= most:
        raise InputError(
            f"Precision at k of {target.name} is defined for k from 1 to {most}, not {k}."
        )
    return _hits(values, positives, k) / k


def ranks(scores: Any, truth: Any, *, column: str | None = None) -> dict[Head, float]:
    """The rank of each head of the circuit by score, 1 the highest; ties share the mean.

    Args:
        scores, truth, column: as in `evaluate`.

    Raises:
        InputError, HeadError, UnknownNameError: as `evaluate`.

    Example:
        >>> interp.circuits.ranks(np.array([[0.9, 0.1], [0.2, 0.8]]), ["L0H0", "L1H0"])
        {L0H0: 1.0, L1H0: 3.0}
    """
    from scipy.stats import rankdata

    target, values, positives = aligned(scores, truth, column)
    place = rankdata(-values)
    by_head = dict(
        zip(sorted(target.heads), place[positives].tolist(), strict=True)
    )  # both by layer and head
    return {h: by_head[h] for h in target.heads}


def roc(scores: Any, positives: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(FPR, TPR, thresholds) of "score ≥ threshold" at ∞ and at each different score, from the
    highest down.

    Args:
        scores: (n,) numbers. positives: (n,) bool.

    Raises:
        InputError: NaN, different lengths, or one of the two classes is empty.
    """
    values, labels = (
        np.asarray(scores, dtype=np.float64).ravel(),
        np.asarray(positives).ravel().astype(bool),
    )
    if len(values) != len(labels):
        raise InputError(
            f"There are {len(values)} scores and {len(labels)} labels; give one label a score."
        )
    if np.isnan(values).any():
        raise InputError(
            f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave those out."
        )
    _two_sided(labels)
    thresholds, group = np.unique(
        -values, return_inverse=True
    )  # ascending: the highest score first
    hits = np.bincount(group, labels)
    false = np.bincount(group, ~labels)
    tpr = np.concatenate([[0.0], np.cumsum(hits) / labels.sum()])
    fpr = np.concatenate([[0.0], np.cumsum(false) / (~labels).sum()])
    return fpr, tpr, np.concatenate([[np.inf], -thresholds])


def curve_areas(fractions: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD) of MIB (Mueller et al. 2025, arXiv 2504.13151): ∫ f and ∫ |1 − f| over the share
    kept, by the trapezoid rule on f_i and |1 − f_i|, on a linear axis.

    As in MIB's code, the areas run from the first to the last fraction and are not divided by that
    range (MIB: 0.001 to 1), and a segment on which f crosses 1 is counted as if it stayed on one
    side. Unlike there, fractions may be any, and are shares of heads where the caller's circuits
    are made of heads (MIB: of edges). f is the caller's: (circuit − all ablated) / (whole − all
    ablated) in the paper.

    Raises:
        InputError: fewer than two points, fractions not ascending within [0, 1], or numbers that
            are not finite.
    """
    x, f = np.asarray(fractions, dtype=np.float64), np.asarray(faithfulness, dtype=np.float64)
    if x.ndim != 1 or x.shape != f.shape or len(x) < 2:
        raise InputError(
            f"A curve has two or more points, not {x.size} fractions and {f.size} values."
        )
    if not (np.isfinite(x).all() and np.isfinite(f).all()):
        raise InputError(
            "Fractions and faithfulness must be finite; leave out what could not be measured."
        )
    if x[0] < 0 or x[-1] > 1 or (np.diff(x) <= 0).any():
        raise InputError("Fractions of heads kept ascend, each once, within 0 to 1.")
    width = np.diff(x)
    distance = np.abs(1 - f)
    cpr = float(np.sum(width * (f[1:] + f[:-1]) / 2))
    return cpr, float(np.sum(width * (distance[1:] + distance[:-1]) / 2))


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


def _hits(values: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Expected positives among the `k` highest: those above the k-th score, and their share of
    those tied with it."""
    cut = np.sort(values)[::-1][k - 1]
    above, tied = values > cut, values == cut
    return float(positives[above].sum() + (k - above.sum()) * positives[tied].mean())


def _p_value(values: np.ndarray, positives: np.ndarray, seed: int) -> float:
    """(1 + draws with a rank sum as high) / (1 + draws): AUC rises with the positives' rank sum."""
    from scipy.stats import rankdata

    place, k = rankdata(values), int(positives.sum())
    draws = np.random.default_rng(seed).random((PERMUTATIONS, len(values))).argsort(1)[:, :k]
    as_high = int((place[draws].sum(1) >= place[positives].sum()).sum())
    return (1 + as_high) / (1 + PERMUTATIONS)


def _two_sided(positives: np.ndarray) -> None:
    """Raise `InputError` unless there are positives and negatives."""
    count = int(positives.sum())
    if count in (0, len(positives)):
        which = "No head is" if count == 0 else "All heads are"
        raise InputError(
            f"{which} in the circuit, so a ranking can't be scored; give one with heads in and out."
        )
