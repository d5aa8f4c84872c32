"""Scores and a known circuit in one order: what is given for either, in whatever form, head by
head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.circuits.known.truth import Truth, published, published_names
from interp.errors import HeadError, InputError
from interp_hooks.heads import Head, parse_heads

#: columns that say which head a row is
KEYS = ("layer", "head", "tower", "kind", "kv_head")


def aligned(
    scores: Any, truth: Any, column: str | None = None
) -> tuple[Truth, np.ndarray, np.ndarray]:
    """(truth, scores (n,) float64, positives (n,) bool), by layer and head. What is taken: see
    `evaluation.evaluate`.

    All heads of a `Truth` must have a score. Where only heads are given, those with a score are the
    ones there are.

    Raises `InputError`, `HeadError`, `UnknownNameError`.
    """
    by_head = scores_by_head(scores, column)
    layers, width = max(h.layer for h in by_head) + 1, max(h.head for h in by_head) + 1
    named = _named(truth, getattr(scores, "model", None))
    if isinstance(named, Truth):
        target = named
        if (layers, width) != (target.n_layers, target.n_heads):
            raise InputError(
                f"The scores are of {layers} layers × {width} heads and the circuit {target.name} "
                f"of {target.n_layers} × "
                f"{target.n_heads}; compare the same model."
            )
        heads = [Head(layer, head) for layer in range(layers) for head in range(width)]
        _complain([h for h in heads if h not in by_head], "have no score")
    else:
        _complain([h for h in named if h not in by_head], "are in the circuit and have no score")
        target = Truth("the heads given", dict.fromkeys(named, "circuit"), layers, width, "given")
        heads = sorted(by_head)
    _complain([h for h in heads if np.isnan(by_head[h])], "have NaN for a score")
    inside = target.matrix()
    return (
        target,
        np.array([by_head[h] for h in heads]),
        np.array([inside[h.layer, h.head] for h in heads]),
    )


def _named(truth: Any, model: str | None) -> Truth | list[Head]:
    """A `Truth`, or heads without their tower's name. By its name alone: the one of this model
    where there is one."""
    if isinstance(truth, Truth):
        return truth
    try:
        return [Head(h.layer, h.head) for h in parse_heads(truth)]
    except HeadError:
        if not isinstance(truth, str) or "," in truth:  # a list of heads, one of them misspelt
            raise
        return published(truth, model if (truth, model) in published_names() else None)


def _complain(heads: Sequence[Head], what: str) -> None:
    """Raise `InputError` naming the heads, if there are any."""
    if heads:
        more = f" and {len(heads) - 10} more" if len(heads) > 10 else ""
        raise InputError(
            f"Heads {', '.join(map(str, heads[:10]))}{more} {what}; score all heads of the model."
        )


def scores_by_head(scores: Any, column: str | None) -> dict[Head, float]:
    """head → score, of one tower, whose name is left out. Raises `InputError`, `HeadError`."""
    if hasattr(scores, "frame") and hasattr(scores, "column"):
        pairs = _rows(scores.frame, column or scores.column)
    elif isinstance(scores, pd.DataFrame):
        pairs = _rows(scores, column)
    elif column is not None:
        raise InputError("column= names a column of a DataFrame, and these scores are none.")
    elif isinstance(scores, Mapping):
        pairs = [(Head.parse(h), value) for h, value in scores.items()]
    else:
        pairs = _cells(scores)
    if not pairs:
        raise InputError("There are no scores; give one for each head.")
    towers = sorted({h.tower for h, _ in pairs})
    if len(towers) > 1:
        raise InputError(
            f"The scores are of the towers {' and '.join(t or '(none)' for t in towers)}; give "
            "one's."
        )
    by_head: dict[Head, float] = {}
    for head, value in pairs:
        plain = Head(head.layer, head.head)
        if plain in by_head:
            raise InputError(f"Head {plain} has two scores; give one.")
        try:
            by_head[plain] = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"The score of {plain} is {value!r}, not a number.") from error
    return by_head


def _cells(scores: Any) -> list[tuple[Head, Any]]:
    """From a (layers, heads) array; masked cells were not measured, NaN."""
    try:
        array = np.ma.filled(np.ma.asarray(scores, dtype=np.float64), np.nan)
    except (TypeError, ValueError) as error:
        raise InputError(
            "Scores are a (layers, heads) array, a dict, a DataFrame or a found circuit."
        ) from error
    if array.ndim != 2:
        raise InputError(f"Scores in an array are (layers, heads), not of shape {array.shape}.")
    return [(Head(layer, head), value) for (layer, head), value in np.ndenumerate(array)]


def _rows(frame: pd.DataFrame, column: str | None) -> list[tuple[Head, Any]]:
    """From a row a head."""
    lacking = [
        name for name in ("layer", "head", *([column] if column else [])) if name not in frame
    ]
    if lacking:
        raise InputError(
            f"The scores have no column {lacking[0]!r}; they have "
            f"{', '.join(map(str, frame.columns))}."
        )
    if column is None:
        rest = [str(c) for c in frame.columns if c not in KEYS]
        if len(rest) != 1:
            names = ", ".join(rest) or "there is none"
            raise InputError(
                f"The scores need one column beside layer and head ({names}); say which with "
                "column=."
            )
        column = rest[0]
    towers = frame["tower"] if "tower" in frame else [""] * len(frame)
    rows = zip(frame["layer"], frame["head"], towers, frame[column], strict=True)
    return [(Head(int(layer), int(head), str(tower)), value) for layer, head, tower, value in rows]
