"""How well a ranking of heads finds a known circuit: ROC, average precision, precision at k, each
with what chance gives."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.circuits.judging.alignment import aligned
from interp.circuits.judging.ranking import (
    areas,
    auc_over_prompts,
    check_two_sided,
    expected_hits,
    hanley_mcneil,
    p_value,
)
from interp.circuits.known.truth import Truth
from interp.errors import InputError, OutputError
from interp.inputs.text import check_seed
from interp.support import typed
from interp.support.files import check_writable, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.results.circuit_table import CircuitTable

AT = (1, 3, 5, 10)
COMPARED = ("auc", "auc_low", "auc_high", "auc_pessimistic", "average_precision", "p")
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
    * `auc_low`, `auc_high`: 95 % by Hanley and McNeil 1982, were the heads others like these;
      `prompts_low`, `prompts_high`: 95 % with the prompts resampled, where the scores are a circuit
      with an effect on each prompt, else None.
    * `p`: share of random circuits of the same size, 2,000 seeded draws and this one, with an AUC
      as high.
    * `ranked`: what is ranked, "heads" or "edges" (then `n_heads` is how many edges).

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
    auc_low: float = 0.0
    auc_high: float = 1.0
    prompts_low: float | None = None
    prompts_high: float | None = None
    ranked: str = "heads"
    notes: tuple[str, ...] = ()

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
                "auc_low",
                "auc_high",
                "prompts_low",
                "prompts_high",
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
            f"Agreement({self.truth}, {self.n_positive} of {self.n_heads} {self.ranked}: AUC "
            f"{self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}] "
            f"(pessimistic {self.auc_pessimistic:.3f}, p = {self.p:.2g}), average precision "
            f"{self.average_precision:.3f} (chance {self.chance:.3f}), precision at {at})"
        )

    def _repr_html_(self) -> str:
        rows = [[k, f"{v:.3f}", f"{self.recall[k]:.3f}"] for k, v in self.precision.items()]
        prompts = None
        if self.prompts_low is not None:
            prompts = f"[{self.prompts_low:.3f}, {self.prompts_high:.3f}] with prompts resampled"
        facts = {
            "in it": f"{self.n_positive} of {self.n_heads} {self.ranked}",
            "ROC AUC": f"{self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}]",
            "": prompts,
            "p": f"{self.p:.2g} against random circuits",
            "average precision": f"{self.average_precision:.3f} (chance {self.chance:.3f})",
        }
        title = f"Agreement with {self.truth}"
        return block(title, "", facts, ["k", "precision", "recall"], rows, self.notes)


def evaluate(
    scores: Any, truth: Any, seed: int = 0, *, of: str = "heads", column: str | None = None
) -> Agreement:
    """Agreement of scores, higher meaning more in the circuit, with a known circuit.

    Args:
        scores: a (layers, heads) array; a dict, head → score; a DataFrame with `layer`, `head` and
            one more column, or `column`; or what has such a `frame` and a `column` (a found
            circuit).
        truth: a `Truth`; heads in any spelling; or the name of a published circuit, "ioi".
        seed: of the random circuits behind `p`.
        of: "heads"; or "edges", of a found circuit that lists all of them against a `Truth` that
            does, ranked by the size of their scores.
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
    if of == "edges":
        return _of_edges(scores, truth, seed)
    if of != "heads":
        raise InputError(f'What is judged is "heads" or "edges", not {of!r}.')
    target, values, positives = aligned(scores, truth, column)
    if not target.complete:
        raise InputError(
            f"The circuit {target.name} lists only its {len(target.heads)} strongest heads, so ROC "
            "and recall are not "
            "defined; use precision_at for small k, or ranks."
        )
    effects = getattr(scores, "effects", None) if column is None else None
    return agreement_of(values, positives, target, seed, effects)


def _of_edges(circuit: Any, truth: Any, seed: int) -> Agreement:
    table = getattr(circuit, "edges", None)
    if not isinstance(truth, Truth) or table is None or not len(table):
        raise InputError(
            "Edges are judged of a found circuit that has some (eap, eap_ig, acdc), against a "
            "Truth that lists its edges (interp.circuits.constructed)."
        )
    labels = truth.edge_labels(table)
    asked = ~np.isnan(labels)
    values = table["score"].abs().to_numpy(dtype=np.float64)[asked]
    return agreement_of(values, labels[asked] == 1, truth, seed, ranked="edges")


def agreement_of(
    values: np.ndarray,
    positives: np.ndarray,
    target: Truth,
    seed: int,
    effects: np.ndarray | None = None,
    ranked: str = "heads",
) -> Agreement:
    """The agreement of values (n,) with positives (n,) bool. effects (n, prompts): whose means'
    magnitudes the values are, if they are."""
    check_two_sided(positives, ranked)
    found = areas(values, positives)
    n, n_positive = len(values), int(positives.sum())
    at = [k for k in sorted({*AT, n_positive}) if k <= n]
    expected = {k: expected_hits(values, positives, k) for k in at}
    low, high = hanley_mcneil(found.auc, n_positive, n - n_positive)
    prompts = None
    if effects is not None and np.allclose(np.abs(effects.mean(1)), values):
        prompts = auc_over_prompts(effects, positives, seed)
    return Agreement(
        auc=found.auc,
        auc_pessimistic=found.pessimistic,
        average_precision=found.average_precision,
        precision={k: expected[k] / k for k in at},
        recall={k: expected[k] / n_positive for k in at},
        n_positive=n_positive,
        n_heads=n,
        truth=target.name,
        chance=n_positive / n,
        p=p_value(values, positives, seed),
        auc_low=low,
        auc_high=high,
        prompts_low=None if prompts is None else prompts[0],
        prompts_high=None if prompts is None else prompts[1],
        ranked=ranked,
        notes=target.notes,
    )


def compare(circuits: Sequence[CircuitTable], truth: Any, seed: int = 0) -> pd.DataFrame:
    """The agreement of found circuits with a known one, a row a circuit, the best AUC first.

    Args:
        circuits: found circuits.
        truth: as in `evaluate`.
        seed: of the random circuits behind `p`.

    Returns:
        Columns `method`, `auc` with its 95 % interval (`auc_low`, `auc_high`),
        `auc_pessimistic`, `average_precision`, `p`, `forwards`, `backwards` (passes over the
        prompts) and `seconds`.

    Raises:
        InputError, HeadError, UnknownNameError: as `evaluate`.

    Example:
        >>> interp.circuits.compare([circuit], ["L2H3", "L3H1"])["method"].tolist()
        ['head_ablation']
    """
    rows = []
    for circuit in circuits:
        agreement, search = evaluate(circuit, truth, seed), circuit.search
        scores = {k: getattr(agreement, k) for k in COMPARED}
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
    return expected_hits(values, positives, k) / k


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
