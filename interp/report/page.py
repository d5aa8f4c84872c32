"""The HTML report of an atlas: one file that opens from disk, with no network and nothing
installed.

plotly.js is inlined once; a content-security policy in the page forbids it, and anything else, to
load more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report.heatmap import DARK, LIGHT, number, of_score
from interp.report.section import Section, plotable

if TYPE_CHECKING:
    from interp.results.head_table import HeadTable
    from interp.results.overlay import Overlay

#: heads listed and outlined a score, and in a row of the summary
TOP = 10
TOP_IN_SUMMARY = 5
#: a figure narrower than this keeps its width, a wider one fills the page
_FULL_WIDTH = 900
_NOT_MEASURED = '<span class="none">not measured</span>'


def render(atlas: HeadTable, heading: tuple[str, str], first: Sequence[Section] = ()) -> str:
    """The whole page: of what it is and its title (`heading`), the sections that come before the
    scores, the scores."""
    from plotly.offline import get_plotlyjs

    figures: dict[str, Any] = {}
    for section in first:
        figures |= section.figures
    looks = "".join(
        _overlay(overlay, f"overlay-{n}", figures) for n, overlay in enumerate(atlas.overlays)
    )
    sections = "".join(_section(atlas, score, figures) for score in atlas.scores)
    # The library must not be able to close its own script element.
    library = re.sub(r"</(script)", r"<\\/\1", get_plotlyjs(), flags=re.IGNORECASE)
    data = {"figures": figures, "palettes": {"light": asdict(LIGHT), "dark": asdict(DARK)}}
    kind, title = heading
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title if title != atlas.model else f"{title}: attention heads")}</title>
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
{_header(atlas, kind, title)}
<div class="page">
{_navigation(atlas, first)}
<main id="main">
{_notes(atlas)}
{"".join(map(_first, first))}
<section id="summary" aria-labelledby="summary-title">
<h2 id="summary-title">Top heads of each score</h2>
{summary_table(atlas, links=True)}
<p class="hint">{_hint(atlas)}</p>
</section>
{looks}
{sections}
{_provenance(atlas)}
</main>
</div>
<script type="application/json" id="data">{_json(data)}</script>
<script>{library}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def summary(atlas: HeadTable) -> str:
    """What Jupyter shows of an atlas: its name, its notes and the table of top heads."""
    notes = "".join(f"<div><em>{escape(n)}</em></div>" for n in atlas.notes)
    return (
        f"<div><strong>{escape(atlas.model)}</strong>, {escape(atlas.shape_text())}</div>{notes}"
        + summary_table(atlas, links=False)
    )


def summary_table(atlas: HeadTable, links: bool) -> str:
    """The strongest heads of every score with their values, a row a score."""
    rows = []
    for score in atlas.scores:
        about = atlas.about(score)
        name = escape(about.title)
        name = f'<a href="#{_anchor(score)}">{name}</a>' if links else name
        heads = " ".join(
            f'<span class="head"><b>{escape(str(h))}</b> {number(v)}</span>'
            for h, v, _ in atlas.ranking(score, TOP_IN_SUMMARY)
        )
        above = atlas.above(score)
        count = "" if above is None else f"{above} ≥ {number(about.threshold or 0.0)}"
        rows.append(
            f'<tr><th scope="row">{name}</th><td class="heads">{heads or _NOT_MEASURED}</td>'
            f'<td class="count">{count}</td></tr>'
        )
    return (
        '<div class="scroll"><table class="summary"><thead><tr><th scope="col">Score</th>'
        '<th scope="col">Strongest heads</th><th scope="col">At the threshold</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _hint(atlas: HeadTable) -> str:
    """How heads are written."""
    towers = [t for t in atlas.towers if t]
    of = f" of the {escape(towers[-1])} tower" if len(atlas.towers) > 1 else ""
    written = f"{towers[-1]}.L5H1" if len(atlas.towers) > 1 else "L5H1"
    return f"{escape(written)} is head 1 of layer 5{of}; both count from 0. Higher is stronger."


def _header(atlas: HeadTable, kind: str, title: str) -> str:
    settings = atlas.provenance.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    facts = [
        ("Heads", atlas.shape_text()),
        ("Context", _tokens(settings.get("context"))),
        ("Samples", settings.get("samples")),
        ("Seed", atlas.provenance.get("seed", settings.get("seed"))),
        ("Measured", _day(atlas.provenance.get("created"))),
    ]
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>"
        for k, v in facts
        if v not in (None, "")
    )
    return (
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><dl '
        f'class="facts">{items}</dl></header>'
    )


def _first(section: Section) -> str:
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title"><h2 '
        f'id="{section.anchor}-title">'
        f"{escape(section.title)}</h2>{section.html}</section>"
    )


def _navigation(atlas: HeadTable, first: Sequence[Section]) -> str:
    before = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in first)
    looks = "".join(
        f'<li><a href="#overlay-{n}-section">Where heads look</a></li>'
        for n in range(len(atlas.overlays))
    )
    links = looks + "".join(
        f'<li><a href="#{_anchor(s)}">{escape(atlas.about(s).title)}</a></li>' for s in atlas.scores
    )
    return (
        f'<nav aria-label="Contents"><ul>{before}<li><a href="#summary">Top heads</a></li>'
        f'{links}<li><a href="#provenance">Where this comes from</a></li></ul></nav>'
    )


def _notes(atlas: HeadTable) -> str:
    if not atlas.notes:
        return ""
    items = "".join(f"<li>{escape(n)}</li>" for n in atlas.notes)
    return f'<section class="notes" aria-label="Notes"><ul>{items}</ul></section>'


def _overlay(overlay: Overlay, element: str, figures: dict[str, Any]) -> str:
    """One picture under its heads. The figure is added to `figures`."""
    figure = overlay.figure()
    height, width = int(figure.layout.height), int(figure.layout.width)
    figure.update_layout(
        title=None, width=None, height=height - 48, margin={"t": 32}, autosize=True
    )
    figures[element] = json.loads(figure.to_json())
    heads = ", ".join(overlay.maps)
    label = (
        f"The picture, and the attention of the word {overlay.token} on it in the heads {heads}."
    )
    marked = " Crosses: visual sinks." if any(overlay.sinks.values()) else ""
    return f"""<section id="{element}-section" aria-labelledby="{element}-title">
<h2 id="{element}-title">Where heads look</h2>
<p class="reading">Attention of “{escape(overlay.token)}”, the last word of “{escape(overlay.prompt)}”, on the picture,
in the heads that look at pictures most. Bright: close to the head's own largest weight.{marked}</p>
<figure style="max-width:{width}px"><div id="{element}" class="plot" role="img" aria-label="{escape(label)}"
 style="height:{height - 48}px"></div></figure></section>"""


def _section(atlas: HeadTable, score: str, figures: dict[str, Any]) -> str:
    """One score. Its figures are added to `figures` by element id."""
    about = atlas.about(score)
    parts = [
        f'<h2 id="{_anchor(score)}-title">{escape(about.title)} <code>{escape(score)}</code></h2>'
    ]
    if about.reading:
        parts.append(f'<p class="reading">{escape(about.reading)}</p>')
    for note in atlas.notes:
        if note.startswith(f"{score}:"):
            parts.append(f'<p class="note">{escape(note)}</p>')
    panels = atlas.panels(score)
    if not np.isfinite(atlas.frame[score]).any():
        parts.append('<p class="none">Not measured in any head.</p>')
        panels = []
    several = len(panels) > 1 or len(atlas.towers) > 1
    for n, (tower, kind) in enumerate(panels):
        parts.append(_panel(atlas, score, tower, kind, f"{_anchor(score)}-{n}", several, figures))
    facts = [
        ("Formula", f"<code>{escape(about.formula)}</code>" if about.formula else ""),
        ("Unit", escape(about.unit)),
        ("Threshold", _threshold(atlas, score)),
        ("Source", escape(about.citation)),
    ]
    items = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts if v)
    parts.append(f'<dl class="about">{items}</dl>' if items else "")
    return (
        f'<section id="{_anchor(score)}" '
        f'aria-labelledby="{_anchor(score)}-title">{"".join(parts)}</section>'
    )


def _threshold(atlas: HeadTable, score: str) -> str:
    threshold, above = atlas.about(score).threshold, atlas.above(score)
    if threshold is None:
        return ""
    measured = int(np.isfinite(atlas.frame[score]).sum())
    count = "" if above is None else f"; {above} of {measured} heads reach it"
    return f"a head counts from {number(threshold)}{count}"


def _panel(
    atlas: HeadTable,
    score: str,
    tower: str,
    kind: str,
    element: str,
    several: bool,
    figures: dict[str, Any],
) -> str:
    about = atlas.about(score)
    ranked = atlas.ranking(score, TOP, tower, kind)
    where = ", ".join(
        n
        for n in (f"{tower} tower" if tower else "", "cross-attention" if kind == "cross" else "")
        if n
    )
    heading = f"<h3>{escape(where[:1].upper() + where[1:])}</h3>" if where and several else ""
    if not ranked:
        return f'{heading}<p class="none">Not measured in any head.</p>'
    figure = of_score(atlas, score, tower, kind, TOP)
    width = figure.layout.width
    figures[element] = plotable(figure)
    n_layers, n_heads = atlas.matrix(score, tower, kind).shape
    best = ", ".join(f"{h} {number(v)}" for h, v, _ in ranked[:3])
    label = (
        f"Heat map of {about.title} over {n_layers} layers and {n_heads} heads; highest: {best}."
    )
    masked = int(np.ma.getmaskarray(atlas.matrix(score, tower, kind)).sum())
    caption = "Layer 0 at the top. Outlined: the strongest heads." + (
        f" Grey: not measured ({masked} heads)." if masked else ""
    )
    has_error = any(e is not None for _, _, e in ranked)
    rows = "".join(
        f"<tr><td>{n}</td><th scope='row'>{escape(str(h))}</th><td>{number(v, 3)}</td>"
        + (
            f"<td class='error'>{'' if e is None else '± ' + number(e, 3)}</td>"
            if has_error
            else ""
        )
        + "</tr>"
        for n, (h, v, e) in enumerate(ranked, 1)
    )
    unit = f" ({escape(about.unit)})" if about.unit else ""
    wide = "" if width is not None and width <= 700 else " wide"
    limit = (
        f' style="max-width:{int(width)}px"' if width is not None and width < _FULL_WIDTH else ""
    )
    return f"""{heading}<div class="panel{wide}">
<figure{limit}><div id="{element}" class="plot" role="img" aria-label="{escape(label)}"
 style="height:{int(figure.layout.height)}px"></div><figcaption>{escape(caption)}</figcaption></figure>
<div class="scroll"><table class="top"><caption>Strongest heads</caption><thead><tr><th scope="col">#</th>
<th scope="col">Head</th><th scope="col"{' colspan="2"' if has_error else ""}>Value{unit}</th></tr></thead>
<tbody>{rows}</tbody></table></div></div>"""


def _provenance(atlas: HeadTable) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in _flat(atlas.provenance)
    )
    return (
        '<section id="provenance" aria-labelledby="provenance-title"><h2 '
        'id="provenance-title">Where this comes from'
        '</h2><div class="scroll"><table '
        f'class="provenance"><tbody>{rows}</tbody></table></div></section>'
    )


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


def _tokens(value: Any) -> str | None:
    return f"{value:,} tokens" if isinstance(value, int) else None if value is None else str(value)


def _day(value: Any) -> str | None:
    """An ISO time as "2025-11-21 08:30"; anything else as it is."""
    text = None if value is None else str(value)
    found = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)", text or "")
    return f"{found[1]} {found[2]}" if found else text


def _anchor(score: str) -> str:
    """An element id. Scores that differ only in odd characters stay apart by their code points."""
    return "score-" + re.sub(r"[^A-Za-z0-9_-]", lambda m: f"_{ord(m[0]):x}_", score)


def _json(data: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: "
    "blob:; "
    "base-uri 'none'; form-action 'none'"
)

_SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // plotly's own default has a button that uploads the figure.
  const config = {displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
  const dress = (figure) => {
    const p = data.palettes[dark.matches ? "dark" : "light"];
    const meta = figure.layout.meta || {};
    // Figures that name a dark colour for each of theirs are dressed by those.
    const other = new Map(Object.entries(dark.matches && meta.dark || {}));
    const f = JSON.parse(JSON.stringify(figure), (key, value) => other.get(value) ?? value);
    f.layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: p.muted, activecolor: p.ink};
    if (meta.dark) return f;
    if (meta.overlay) {
      f.layout.font = {...f.layout.font, color: p.ink};
      f.layout.paper_bgcolor = f.layout.plot_bgcolor = "rgba(0,0,0,0)";
      return f;
    }
    for (const trace of f.data) trace.colorscale = p.scale;
    f.layout.font.color = p.ink;
    f.layout.plot_bgcolor = p.gap;
    f.layout.hoverlabel = {bgcolor: p.hover, bordercolor: p.muted, font: {...f.layout.hoverlabel.font, color: p.ink}};
    for (const shape of f.layout.shapes || []) shape.line.color = p.ring;
    return f;
  };
  const draw = (id) => {
    const f = dress(data.figures[id]);
    return Plotly.react(id, f.data, f.layout, config);
  };
  const all = () => Object.keys(data.figures).reduce(
    // One after the other, with the page responsive in between.
    (before, id) => before.then(() => new Promise((next) => setTimeout(next, 0))).then(() => draw(id)),
    Promise.resolve());
  dark.addEventListener("change", all);
  all();
})();
"""

_STYLE = """
:root { --paper:#ffffff; --panel:#f6f7f9; --ink:#1f2933; --muted:#5f6b7a; --line:#e1e5ea; --accent:#c2410c;
  --note:#fff4e6; }
@media (prefers-color-scheme: dark) {
  :root { --paper:#12161c; --panel:#1a2029; --ink:#e6e9ee; --muted:#9aa5b4; --line:#2c343f; --accent:#ffa94d;
    --note:#2b2118; }
}
* { box-sizing:border-box; }
html { scroll-behavior:smooth; scroll-padding-top:1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior:auto; } }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.55; font-size:1rem;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
a { color:var(--accent); text-decoration:none; } a:hover, a:focus-visible { text-decoration:underline; }
:focus-visible { outline:2px solid var(--accent); outline-offset:2px; border-radius:2px; }
.skip { position:absolute; left:-99rem; } .skip:focus { left:1rem; top:1rem; background:var(--paper); padding:.5rem; }
header, .page { max-width:77rem; margin:0 auto; padding:0 1.5rem; }
header { padding-top:3rem; }
.kind { margin:0; color:var(--accent); font-size:.875rem; font-weight:600; letter-spacing:.02em; }
h1 { margin:.1rem 0 1.1rem; font-size:clamp(1.75rem,4vw,2.5rem); line-height:1.15; letter-spacing:-.02em;
  overflow-wrap:anywhere; }
h2 { margin:0 0 .4rem; font-size:1.35rem; line-height:1.3; letter-spacing:-.01em; }
h2 code { margin-left:.4rem; font-size:.8rem; font-weight:400; color:var(--muted); letter-spacing:0; }
h3 { margin:1.25rem 0 .25rem; font-size:1rem; }
code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace; font-size:.9em; }
dl { margin:0; } dd { margin:0; } dt { color:var(--muted); font-size:.8125rem; }
.facts { display:flex; flex-wrap:wrap; gap:.75rem 2.25rem; padding-bottom:1.75rem;
  border-bottom:1px solid var(--line); }
.facts dd { font-weight:600; }
.page { display:grid; grid-template-columns:12rem minmax(0,1fr); gap:2.5rem; align-items:start;
  padding-top:2rem; padding-bottom:4rem; }
nav { position:sticky; top:1.5rem; max-height:calc(100vh - 3rem); overflow:auto; font-size:.9rem; }
nav ul { list-style:none; margin:0; padding:0; }
nav a { display:block; padding:.2rem 0; color:var(--muted); } nav a:hover, nav a:focus-visible { color:var(--accent); }
main > section { margin-bottom:2.75rem; padding-bottom:2.75rem; border-bottom:1px solid var(--line); }
main > section:last-child { border-bottom:0; margin-bottom:0; }
main > .notes { padding:.75rem 1.1rem; border:0; border-left:3px solid var(--accent); background:var(--note);
  border-radius:0 6px 6px 0; }
.notes ul { margin:0; padding-left:1.1rem; }
.reading { margin:.1rem 0 .9rem; max-width:46rem; }
.note { margin:.4rem 0 .9rem; padding-left:.75rem; border-left:3px solid var(--accent); }
.hint, figcaption, .none { color:var(--muted); font-size:.875rem; }
.hint { margin:.75rem 0 0; }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:.4rem .75rem .4rem 0; text-align:left; vertical-align:baseline; border-bottom:1px solid var(--line); }
th { font-weight:600; } thead th, caption { color:var(--muted); font-weight:400; font-size:.8125rem; }
caption { text-align:left; padding-bottom:.25rem; }
tbody tr:last-child > * { border-bottom:0; }
.scroll { overflow-x:auto; }
.summary { width:100%; } .summary th[scope=row] { white-space:nowrap; padding-right:1.5rem; }
.heads { line-height:1.9; } .head { display:inline-block; min-width:6.6rem; white-space:nowrap; }
.count { white-space:nowrap; color:var(--muted); text-align:right; padding-right:0; }
.summary thead th:last-child { text-align:right; padding-right:0; }
.panel { display:grid; grid-template-columns:minmax(0,1fr) auto; gap:.5rem 2.25rem; align-items:start; }
.panel.wide { grid-template-columns:minmax(0,1fr); }
figure { margin:0; min-width:0; width:100%; } .plot { width:100%; } figcaption { padding-left:60px; }
.top td, .top th { padding:.2rem .9rem .2rem 0; } .top td:first-child, .top .error { color:var(--muted); }
.panel.wide .top tbody { display:grid; grid-template-columns:repeat(auto-fill,minmax(15rem,1fr)); }
.panel.wide .top { width:100%; } .panel.wide .top, .panel.wide .top caption { display:block; }
.panel.wide .top thead { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
.panel.wide .top tr { display:flex; } .panel.wide .top tr > * { border-bottom:0; }
.panel.wide .top td:first-child { min-width:1.9rem; padding-right:0; }
.drawing { min-width:40rem; max-width:52rem; } .facts.plain { border-bottom:0; padding-bottom:1rem; }
.columns { display:flex; flex-wrap:wrap; gap:1.5rem 3.5rem; align-items:start; margin-top:1.5rem; }
.about { display:grid; gap:.35rem; margin-top:1.1rem; font-size:.9rem; }
.about > div { display:grid; grid-template-columns:5.5rem minmax(0,1fr); } .about dd { overflow-wrap:anywhere; }
.provenance th { color:var(--muted); font-weight:400; white-space:nowrap; padding-right:2rem; }
.provenance td { overflow-wrap:anywhere; }
@media (max-width:60rem) {
  .page { grid-template-columns:minmax(0,1fr); gap:1.5rem; padding-top:1.25rem; }
  nav { position:static; max-height:none; } nav ul { display:flex; flex-wrap:wrap; gap:0 1.1rem; }
}
@media (max-width:48rem) {
  header, .page { padding-left:1rem; padding-right:1rem; } header { padding-top:1.5rem; }
  .panel { grid-template-columns:minmax(0,1fr); } figcaption { padding-left:0; }
  .summary, .summary tbody, .summary tr, .summary th, .summary td { display:block; border:0; padding:0; }
  .summary thead { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
  .summary tr { padding:.5rem 0; border-bottom:1px solid var(--line); } .count { text-align:left; }
}
@media print { nav, .skip, .modebar { display:none; } .page { display:block; } section { break-inside:avoid; } }
"""
