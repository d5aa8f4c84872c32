"""A head's card: roles with their reasons, every score in its place, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report import card_text
from interp.report.heatmap import number
from interp.report.templating import rendered
from interp.results.evidence import Evidence, HeadEvidence
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import pandas as pd

    from interp.results.head_table import HeadTable

#: a score without a role stands out in so many percent of the heads at either end, of so many heads
EXTREME, FEW = 2.0, 25
#: roles that a page opens on, by their score: the strongest head of the first that has one
OPENING = {"retrieval": "the strongest retrieval head", "induction": "the strongest induction head"}


@dataclass(frozen=True)
class Role:
    """What a head is called, and why: a score at its threshold."""

    name: str
    reason: str


@dataclass(frozen=True)
class Standing:
    """A score's value for one head among all heads of its tower and kind.

    Attributes:
        score, title, unit: of the score.
        value, error: the number and its standard error over samples, None where there is none.
        rank, of: its place among the measured heads, 1 the highest.
        percentile: the share of the other heads that are lower, ties counted half; in percent.
        threshold: from which a head counts, None where the score has none.
        role: what such a head is called; "" where the score names no role.
        tied: how many heads have this value, itself among them.
    """

    score: str
    title: str
    unit: str
    value: float
    error: float | None
    rank: int
    of: int
    percentile: float
    threshold: float | None
    role: str = ""
    tied: int = 1

    @property
    def place(self) -> str:
        """ "4 of 270"; "=1 of 270" where others have the same value."""
        return f"{'=' if self.tied > 1 else ''}{self.rank} of {self.of}"

    @property
    def reaches(self) -> bool:
        return self.threshold is not None and self.value >= self.threshold


@dataclass(frozen=True)
class Card:
    """All that is known of a head; `Atlas.card` makes one.

    Attributes:
        model, head: names.
        kv_head: the key/value head it reads, and how many query heads share it.
        roles: by the rule that a score which names a role reaches its threshold.
        standings: every measured score.
        evidence: passages, OV directions and partners; None where the scan kept none.

    Example:
        >>> card = atlas.card("L0H2")
        >>> card.roles[0].name, card.standings[0].rank
        ('previous-token head', 2)
    """

    model: str
    head: str
    kv_head: tuple[int, int] | None
    roles: list[Role]
    standings: list[Standing]
    evidence: HeadEvidence | None = None

    @classmethod
    def of(cls, table: HeadTable, head: Head, evidence: HeadEvidence | None) -> Card:
        """The card of a head of a table. Raises `HeadError`."""
        table.heads_at(head)  # there is such a head
        found = standings(table).get(str(head), [])
        return cls(table.model, str(head), sharing(table)[str(head)], roles(found), found, evidence)

    @property
    def extremes(self) -> list[str]:
        """What the head is among the highest or lowest in, of the scores that name no role."""
        said = []
        for s in self.standings:
            if s.role or s.of < FEW:
                continue
            if s.percentile >= 100 - EXTREME:
                place = "highest" if s.rank == 1 else f"{ordinal(s.rank)} highest"
            elif s.percentile <= EXTREME:
                low = s.of - s.rank + 1
                place = "lowest" if low == 1 else f"{ordinal(low)} lowest"
            else:
                continue
            unit = f" {s.unit}" if s.unit else ""
            tied = f", with {s.tied - 1} more" if s.tied > 1 else ""
            said.append(f"{s.title.lower()} {number(s.value)}{unit}: {place} of {s.of}{tied}")
        return said

    def __str__(self) -> str:
        return card_text.text(self)

    def __repr__(self) -> str:
        said = ", ".join(role.name for role in self.roles) or "no role"
        return f"Card({self.head} of {self.model}: {said}; {len(self.standings)} scores)"

    def _repr_html_(self) -> str:
        kept = self.evidence or HeadEvidence()
        passages = card_text.ordered(kept.passages)
        words = dict(writes=card_text.WRITES, partners=card_text.PARTNERS)
        return rendered(
            "card.html.j2",
            card=self,
            passages=passages,
            writes=[card_text.writes_said(w) for w in kept.writes],
            partners=card_text.partners_said(kept.partners),
            built="" if kept.built is None else card_text.built_said(kept.built),
            words=words,
            rows=[card_text.row(s) for s in self.standings],
            headings=card_text.HEADINGS,
        )


def cards(table: HeadTable, evidence: Evidence | None) -> dict[str, Card]:
    """head → its card, of all heads; those of self-attention where a name stands for two."""
    found, shared = standings(table), sharing(table)
    return {
        name: Card(
            table.model,
            name,
            kv,
            roles(found.get(name, [])),
            found.get(name, []),
            None if evidence is None else evidence.of(name),
        )
        for name, kv in shared.items()
    }


def opening(cards: Mapping[str, Card]) -> tuple[str, str] | None:
    """(head, why): the card to show first, of the strongest retrieval head where there is one, else
    of the strongest induction head, else of the head with most roles; None where none has any."""
    for score, why in OPENING.items():
        found = [
            (s.value, len(card.roles), name)
            for name, card in cards.items()
            for s in card.standings
            if s.score == score and s.role and s.reaches
        ]
        if found:
            value, most = max(f[:2] for f in found)
            return next(name for v, n, name in found if (v, n) == (value, most)), why
    name = max(cards, key=lambda c: len(cards[c].roles), default=None)
    if name is None or not cards[name].roles:
        return None
    several = len(cards[name].roles) > 1
    return name, "the head with most roles" if several else "a head with a role"


def standings(table: HeadTable) -> dict[str, list[Standing]]:
    """head → where it stands in each score that it was measured in, among the heads of its tower
    and kind."""
    found: dict[str, list[Standing]] = {}
    for _, rows in _panels(table):
        names = _names(rows)
        for score in table.scores:
            about, values = table.about(score), rows[score].to_numpy(float)
            column = f"{score}_stderr"
            errors = rows[column].to_numpy(float) if column in rows else np.full(len(rows), np.nan)
            measured = np.isfinite(values)
            order = np.sort(values[measured])
            lower = np.searchsorted(order, values, "left")
            higher = len(order) - np.searchsorted(order, values, "right")
            for i in np.flatnonzero(measured).tolist():
                others = max(1, len(order) - 1)
                same = len(order) - lower[i] - higher[i] - 1
                found.setdefault(names[i], []).append(
                    Standing(
                        score=score,
                        title=about.title,
                        unit=about.unit,
                        value=float(values[i]),
                        error=float(errors[i]) if np.isfinite(errors[i]) else None,
                        rank=int(higher[i]) + 1,
                        of=len(order),
                        percentile=100 * float(lower[i] + same / 2) / others,
                        threshold=about.threshold,
                        role=about.role if about.grain == "head" else "",
                        tied=int(same) + 1,
                    )
                )
    return found


def sharing(table: HeadTable) -> dict[str, tuple[int, int] | None]:
    """head → its key/value head and how many query heads share it, None where that is unknown."""
    found: dict[str, tuple[int, int] | None] = {}
    for _, rows in _panels(table):
        counts = rows.groupby(["layer", "kv_head"])["head"].transform("size").tolist()
        pairs = zip(_names(rows), rows["kv_head"].tolist(), counts, strict=True)
        found |= {name: (int(kv), int(n)) if kv >= 0 else None for name, kv, n in pairs}
    return found


def _panels(table: HeadTable) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """(tower, kind) and its rows; of a tower's kinds self-attention alone, where it has any."""
    panels = {(str(t), str(k)): rows for (t, k), rows in table.frame.groupby(["tower", "kind"])}
    return [
        (panel, rows)
        for panel, rows in panels.items()
        if panel[1] == "self" or (panel[0], "self") not in panels
    ]


def _names(rows: pd.DataFrame) -> list[str]:
    places = zip(rows["layer"], rows["head"], rows["tower"], strict=True)
    return [str(Head(int(layer), int(head), str(tower))) for layer, head, tower in places]


def roles(standings: Sequence[Standing]) -> list[Role]:
    """The roles that a head has: one for each score that names one and is at its threshold, those
    furthest past their thresholds first."""
    reached = [s for s in standings if s.role and s.reaches]
    reached.sort(key=lambda s: -s.value / (s.threshold or 1))
    return [Role(s.role, reason(s)) for s in reached]


def reason(s: Standing) -> str:
    """ "induction 0.91 ± 0.02, counts from 0.40; 2nd of 270"."""
    error = f" ± {number(s.error)}" if s.error is not None else ""
    unit = f" {s.unit}" if s.unit else ""
    return (
        f"{s.title.lower()} {number(s.value)}{error}{unit}, counts from "
        f"{number(s.threshold or 0.0)}; {ordinal(s.rank)} of {s.of}"
    )


def ordinal(n: int) -> str:
    """ "1st", "2nd", "11th"."""
    last = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{last}"


def for_page(card: Card) -> dict[str, Any]:
    """What the page's script shows of a card, beside the scores it has already."""
    kept = card.evidence or HeadEvidence()
    said: dict[str, Any] = {}
    if card.roles:
        said["roles"] = [[r.name, r.reason] for r in card.roles]
    if card.kv_head is not None and card.kv_head[1] > 1:
        said["kv"] = list(card.kv_head)
    if kept.passages:
        said["passages"] = [
            [[list(p) for p in e.parts], round(e.weight, 3), list(e.promotes)]
            for e in card_text.ordered(kept.passages)
        ]
    if kept.built is not None:
        said["built"] = card_text.built_said(kept.built)
    if kept.writes:
        said["writes"] = [
            [round(w.share, 4), list(w.reads), list(w.promotes), list(w.lowers)]
            for w in kept.writes
        ]
    if kept.partners:
        said["partners"] = [
            [int(earlier), head, [[p.kind, round(p.score, 3)] for p in some]]
            for earlier in (True, False)
            for head, some in card_text.by_head(
                p for p in kept.partners if p.earlier == earlier
            ).items()
        ]
    return said
