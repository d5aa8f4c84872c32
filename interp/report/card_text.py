"""A head's card in words: what `print(card)`, `interp show --head` and the page say alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from interp.report.heatmap import number

if TYPE_CHECKING:
    from typing import Protocol

    from interp.results.evidence import Built, HeadEvidence, Partner, Passage, Writes

    class Standing(Protocol):
        """What is said of a score: `card.Standing`."""

        @property
        def title(self) -> str: ...
        @property
        def unit(self) -> str: ...
        @property
        def value(self) -> float: ...
        @property
        def error(self) -> float | None: ...
        @property
        def place(self) -> str: ...
        @property
        def percentile(self) -> float: ...
        @property
        def threshold(self) -> float | None: ...

    class Role(Protocol):
        """What a head is called: `card.Role`."""

        @property
        def name(self) -> str: ...
        @property
        def reason(self) -> str: ...

    class Card(Protocol):
        """What is said of a head: `card.Card`, which this module does not import."""

        @property
        def head(self) -> str: ...
        @property
        def model(self) -> str: ...
        @property
        def kv_head(self) -> tuple[int, int] | None: ...
        @property
        def roles(self) -> Sequence[Role]: ...
        @property
        def extremes(self) -> Sequence[str]: ...
        @property
        def standings(self) -> Sequence[Standing]: ...
        @property
        def evidence(self) -> HeadEvidence | None: ...


#: what stands over each part
PASSAGES = (
    "Where it does most, by attention weight, from the ▸token that looks◂ to the [token looked at]"
)
WRITES = "Its OV circuit: the directions that carry most of it, by their share of ‖W_OV‖²"
PARTNERS = (
    "With whom it composes: how much of what the earlier head writes the later one reads by its "
    "queries (Q), keys (K) or values (V), 0 to 1; furthest above random first"
)
#: a passage, as text, marks the token that looks and the one looked at so
MARKS = {"query": "▸{}◂", "key": "[{}]", "both": "[▸{}◂]", "": "{}"}
HEADINGS = ("score", "value", "±", "rank", "percentile", "counts from")


def title(card: Card) -> str:
    """The head, and what it is called."""
    said = "; also ".join(role.name for role in card.roles) or "no role by these scores"
    return f"{card.head} of {card.model}: {said}"


def text(card: Card) -> str:
    """All that a card knows, in lines."""
    lines = [title(card)]
    if shared := sharing_said(card):
        lines.append(f"  {shared}")
    lines += [f"  {role.name}: {role.reason}" for role in card.roles]
    lines += [f"  {said}" for said in card.extremes]
    kept = card.evidence
    if kept is None:
        lines += ["", "No passages: this scan kept none; scan again for them."]
    else:
        passages = [
            f"  {passage_text(p.parts)}  ({number(p.weight)})" for p in ordered(kept.passages)
        ]
        if kept.built is not None:
            passages.append(f"  {built_said(kept.built)}")
        writes = [f"  {writes_said(w)}" for w in kept.writes]
        partners = [f"  It {said}" for said in partners_said(kept.partners)]
        for heading, some in ((PASSAGES, passages), (WRITES, writes), (PARTNERS, partners)):
            lines += ["", heading, *some] if some else []
    return "\n".join([*lines, *table(card.standings)])


def table(standings: Sequence[Standing]) -> list[str]:
    """The scores in columns, a blank line before them; nothing without any."""
    if not standings:
        return []
    rows = [HEADINGS, *map(row, standings)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADINGS))]
    return [
        "",
        *(
            "  ".join(
                [
                    r[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True)),
                ]
            ).rstrip()
            for r in rows
        ),
    ]


def row(s: Standing) -> tuple[str, ...]:
    """A score's title, value with its unit, error, place, percentile and threshold."""
    unit = f" {s.unit}" if s.unit else ""
    return (
        s.title,
        f"{number(s.value, 3)}{unit}",
        "" if s.error is None else number(s.error, 3),
        s.place,
        f"{s.percentile:.0f}",
        "" if s.threshold is None else number(s.threshold),
    )


def sharing_said(card: Card) -> str:
    """Whose keys and values it reads, where others do too."""
    if card.kv_head is None or card.kv_head[1] < 2:
        return ""
    return f"one of {card.kv_head[1]} heads that read key/value head {card.kv_head[0]}"


def ordered(passages: Iterable[Passage]) -> list[Passage]:
    """By the number that is shown beside them, the largest first."""
    return sorted(passages, key=lambda p: -p.weight)


def passage_text(parts: Sequence[tuple[str, str]]) -> str:
    """A passage in a line: ▸the token that looks◂ and [the one looked at]."""
    joined = "".join(_marked(piece, role) for piece, role in parts)
    return " ".join(joined.replace("\n", "↵").split())


def built_said(built: Built) -> str:
    """Who wrote the query and the key of the first passage."""
    query, key = (
        ", ".join(f"{name} {value:+.2g}" for name, value in side)
        for side in (built.query, built.key)
    )
    return (
        f"The first of these scores {built.score:.2g} before the softmax. Its query is written by "
        f"{query}; its key by {key}."
    )


def writes_said(w: Writes) -> str:
    """A direction of its OV circuit: "7%: reads “a” “b”, promotes “c” “d”"."""
    return f"{w.share:.0%}: reads {quoted(w.reads)}, promotes {quoted(w.promotes)}"


def partners_said(partners: Sequence[Partner]) -> list[str]:
    """ "reads from L17H8 (K 0.17, Q 0.07), L16H0 (K 0.16)" and "is read by …", each head once."""
    said = []
    for earlier, verb in ((True, "reads from"), (False, "is read by")):
        found = by_head(p for p in partners if p.earlier == earlier)
        if found:
            names = (
                f"{head} ({', '.join(f'{p.kind.upper()} {number(p.score)}' for p in some)})"
                for head, some in found.items()
            )
            said.append(f"{verb} {', '.join(names)}")
    return said


def by_head(partners: Iterable[Partner]) -> dict[str, list[Partner]]:
    """head → in what ways it composes, what is furthest above random matrices first."""
    found: dict[str, list[Partner]] = {}
    for p in sorted(partners, key=lambda p: -p.above_random):
        found.setdefault(p.head, []).append(p)
    return found


def quoted(tokens: Sequence[str]) -> str:
    """Tokens side by side, their blanks left out."""
    return " ".join(f"“{t.strip() or '␣'}”".replace("\n", "↵") for t in tokens)


def _marked(piece: str, role: str) -> str:
    if not role:
        return piece
    blank = piece[: len(piece) - len(piece.lstrip(" "))]
    return blank + MARKS[role].format(piece.lstrip(" ") or "␣")
