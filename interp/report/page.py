"""The HTML report of an atlas: one file that opens from disk, with no network and nothing
installed.

Maps, table and cards are drawn by a script of the page's own, circuits and curves as SVG. A
content-security policy in the page forbids it to load anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from interp.report import explorer, overlay_section, score_section, summary
from interp.report.card import Card
from interp.report.section import Section
from interp.report.templating import asset, rendered

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable


def render(
    atlas: HeadTable,
    heading: tuple[str, str],
    sections: Sequence[Section] = (),
    cards: Mapping[str, Card] = MappingProxyType({}),
    shown: HeadTable | None = None,
) -> str:
    """The whole page: of what it is and its title (`heading`), the sections beside the scores, and
    all scores (of `shown`, where that is another table) with the cards of heads."""
    kind, title = heading
    overlays = [overlay_section.of(o, f"overlay-{n}") for n, o in enumerate(atlas.overlays)]
    two = any(s.anchor == "comparison" for s in sections)
    # a comparison has three maps of each score: in both scans, and the change
    walked = explorer.data(shown or atlas, cards, 0 if shown is None else 3)
    return rendered(
        "page.html.j2",
        kind=kind,
        title=title,
        atlas=atlas,
        # of two atlases the comparison says it of both
        facts={} if two else _facts(atlas),
        notes=[] if two else atlas.notes,
        first=[s for s in sections if not s.after],
        after=[s for s in sections if s.after],
        rows=summary.rows(atlas),
        hint=summary.hint(atlas),
        overlays=overlays,
        pictures={o.element: o.data for o in overlays},
        over=asset("overlay.js"),
        scores=[score_section.of(atlas, score) for score in atlas.scores],
        explorer=walked,
        signed=any(s["signed"] for s in walked["scores"]),
        unnamed=_unnamed(shown or atlas),
        # how much each score was measured on stands in its section
        provenance=list(_flat({k: v for k, v in atlas.provenance.items() if k != "measured"})),
        style=asset("report.css"),
        walk=asset("explorer.js"),
    )


def _facts(atlas: HeadTable) -> dict[str, str]:
    """What was measured and how, by name; without what is not known."""
    settings = atlas.provenance.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    facts = {
        "Heads": atlas.shape_text(),
        "Context": _tokens(settings.get("context")),
        "Samples": settings.get("samples"),
        "Seed": atlas.provenance.get("seed", settings.get("seed")),
        "Before each text": " ".join(atlas.provenance.get("before_text") or ()),
        "Measured": _day(atlas.provenance.get("created")),
        "Weights": _weights(atlas.provenance.get("origin")),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested entries as "settings · context", with None left out."""
    for key, entry in value.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(entry, dict):
            yield from _flat(entry, f"{name} · ")
        elif isinstance(entry, list | tuple):
            yield name, ", ".join(map(str, entry))
        elif isinstance(entry, float):
            yield name, f"{entry:.6g}"
        elif entry is not None:
            yield name, str(entry)


def _weights(origin: Any) -> str | None:
    """Where the weights come from, in a line; of an eye before another model, where that one's come
    from too."""
    if not isinstance(origin, dict) or not origin.get("source"):
        return None
    said = ", ".join(str(origin[k]) for k in ("source", "weights", "folder") if origin.get(k))
    behind = _weights(origin.get("language_model"))
    return f"eye: {said}; language model: {behind}" if behind else said


def _unnamed(atlas: HeadTable) -> list[str]:
    """The titles of scores that have a threshold and name no role."""
    every = [atlas.about(score) for score in atlas.scores]
    return [about.title for about in every if about.threshold is not None and not about.role]


def _tokens(value: Any) -> str | None:
    return f"{value:,} tokens" if isinstance(value, int) else None if value is None else str(value)


def _day(value: Any) -> str | None:
    """An ISO time as "2025-11-21 08:30"; anything else as it is."""
    text = None if value is None else str(value)
    match = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)", text or "")
    return f"{match[1]} {match[2]}" if match else text
