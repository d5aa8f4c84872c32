"""The part of the page that is walked through: all scores as maps on one frame, a table of heads,
and the card of whichever head is chosen. Its data, for the page's script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report.card import Card, for_page, opening
from interp.results.places import noun

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable

#: digits of a number on the page
DIGITS = 4


def data(table: HeadTable, cards: Mapping[str, Card], columns: int = 0) -> dict[str, Any]:
    """Heads, scores, and the cards of the heads that have one; `columns`: how many maps stand in a
    row, 0 as many as there is room for."""
    frame = table.frame.reset_index(drop=True)
    panels = list(dict.fromkeys(zip(frame["tower"], frame["kind"], strict=True)))
    number_of = {panel: i for i, panel in enumerate(panels)}
    names = [
        f"{tower + '.' if tower else ''}L{layer}H{head}"
        for tower, layer, head in zip(frame["tower"], frame["layer"], frame["head"], strict=True)
    ]
    heads = [
        [number_of[t, k], int(layer), int(head), int(kv)]
        for t, k, layer, head, kv in zip(
            *(frame[c] for c in ("tower", "kind", "layer", "head", "kv_head")), strict=True
        )
    ]
    kept = {name: for_page(card) for name, card in cards.items()}
    selves = {t for t, k in panels if k == "self"}
    return dict(
        columns=columns,
        opens=opening(cards),
        panels=[_panel(tower, kind, len(panels) > 1) for tower, kind in panels],
        names=names,
        heads=heads,
        scores=[_score(table, frame, score) for score in table.scores],
        # cross-attention's heads have the names of self-attention's, whose cards these are
        cards=[
            kept.get(name, {}) if kind == "self" or tower not in selves else {}
            for name, tower, kind in zip(names, frame["tower"], frame["kind"], strict=True)
        ],
    )


def _panel(tower: str, kind: str, several: bool) -> str:
    """What a panel's heads are, where there are several."""
    if not several:
        return ""
    parts = [f"{tower} tower" if tower else "", "cross-attention" if kind == "cross" else ""]
    return ", ".join(p for p in parts if p) or "self-attention"


def _score(table: HeadTable, frame: Any, score: str) -> dict[str, Any]:
    about = table.about(score)
    column = f"{score}_stderr"
    values = frame[score].to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    said: dict[str, Any] = dict(
        name=score,
        title=about.title,
        unit=about.unit,
        grain=noun(about.grain),
        threshold=about.threshold,
        low=_end(about.low, finite.min() if len(finite) else 0.0),
        high=_end(about.high, finite.max() if len(finite) else 1.0),
        signed=bool(len(finite) and finite.min() < 0 and about.low is None),
        values=_numbers(values),
    )
    if column in frame and np.isfinite(frame[column].to_numpy(dtype=float)).any():
        said["errors"] = _numbers(frame[column].to_numpy(dtype=float))
    return said


def _end(fixed: float | None, own: float) -> float:
    """The end of a colour range: what is fixed, else the data's."""
    return float(own if fixed is None else fixed)


def _numbers(values: np.ndarray) -> list[float | None]:
    """Rounded to a few digits; None where not measured."""
    return [None if not np.isfinite(v) else float(f"{v:.{DIGITS}g}") for v in values.tolist()]
