"""What moved between two tables of one grid: each shared score in both, and its change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from interp.results.head_table import HeadTable

#: what tells a head apart
PLACE = ["tower", "kind", "layer", "head", "kv_head"]


class Move(NamedTuple):
    """A head's score in both tables, `z` its change in standard errors of the change, None where
    the scores are not sampled."""

    head: str
    score: str
    before: float
    after: float
    change: float
    z: float | None


def both(one: HeadTable, other: HeadTable, pairs: Sequence[tuple[str, str]]) -> HeadTable:
    """A table with three scores for each pair: the first's, the second's, second − first."""
    index = [c for c in PLACE if c in one.frame and c in other.frame]
    frame = one.frame[PLACE].copy()
    about = {}
    for first, second in pairs:
        name, said = _name(first, second), one.about(first)
        joined = one.frame[index].merge(
            other.frame[[*index, *_columns(other, second)]], on=index, how="left"
        )
        a, b = one.frame[first].to_numpy(float), joined[second].to_numpy(float)
        errors = [_errors(one.frame, first), _errors(joined, second)]
        ends = [x[np.isfinite(x)] for x in (a, b)]
        low, high = (
            fixed if fixed is not None else float(take(np.concatenate([*ends, [0.0]])))
            for fixed, take in ((said.low, np.min), (said.high, np.max))
        )
        frame[name], frame[f"{name}_after"], frame[f"{name}_change"] = a, b, b - a
        if errors[0] is not None:
            frame[f"{name}_stderr"] = errors[0]
        if errors[1] is not None:
            frame[f"{name}_after_stderr"] = errors[1]
        if errors[0] is not None and errors[1] is not None:
            frame[f"{name}_change_stderr"] = np.hypot(errors[0], errors[1])
        plain = replace(said, low=low, high=high)
        about[name] = replace(plain, title=f"{said.title}, first")
        about[f"{name}_after"] = replace(plain, title=f"{said.title}, second")
        about[f"{name}_change"] = replace(
            said,
            title=f"{said.title}, second − first",
            low=None,
            high=None,
            threshold=None,
            role="",
        )
    _share_scales(frame, about)
    return HeadTable(frame, one.provenance, (), about)


def _share_scales(frame: pd.DataFrame, about: dict[str, Any]) -> None:
    """Makes the colours of changes reach equally far, of the scores that share a range and a unit:
    else a small change looks like a large one."""
    kinds: dict[Any, list[str]] = {}
    for name in (n.removesuffix("_after") for n in about if n.endswith("_after")):
        plain = about[name]
        kinds.setdefault((plain.unit, plain.low, plain.high), []).append(f"{name}_change")
    for some in kinds.values():
        sizes = np.abs(frame[some].to_numpy(float))
        most = float(sizes[np.isfinite(sizes)].max(initial=0.0))
        for name in some:
            about[name] = replace(about[name], high=most or None)


def moves(table: HeadTable, names: Sequence[str], k: int) -> list[Move]:
    """The k largest changes of a table of `both`, by their size in the score's own range."""
    found = []
    for name in names:
        change = table.frame[f"{name}_change"].to_numpy(float)
        about = table.about(name)
        size = (about.high or 0.0) - (about.low or 0.0) or 1.0
        error = f"{name}_change_stderr"
        spread = table.frame[error].to_numpy(float) if error in table.frame else None
        order = np.argsort(-np.where(np.isfinite(change), np.abs(change), -1), kind="stable")
        for row in order[:k]:
            if not np.isfinite(change[row]) or change[row] == 0:
                continue
            at = table.frame.iloc[row]
            own = None if spread is None or not spread[row] > 0 else change[row] / spread[row]
            head = f"{at['tower'] + '.' if at['tower'] else ''}L{at['layer']}H{at['head']}"
            found.append(
                (
                    abs(change[row]) / size,
                    Move(
                        head,
                        about.title.removesuffix(", first"),
                        float(at[name]),
                        float(at[f"{name}_after"]),
                        float(change[row]),
                        None if own is None else float(own),
                    ),
                )
            )
    return [move for _, move in sorted(found, key=lambda f: -f[0])[:k]]


def names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The columns of the first's scores in a table of `both`."""
    return [_name(first, second) for first, second in pairs]


def _name(first: str, second: str) -> str:
    return first if first == second else f"{first}~{second}"


def _columns(table: HeadTable, score: str) -> list[str]:
    error = f"{score}_stderr"
    return [score, error] if error in table.frame else [score]


def _errors(frame: pd.DataFrame, score: str) -> np.ndarray | None:
    column = f"{score}_stderr"
    return frame[column].to_numpy(float) if column in frame else None
