"""Figures. plotly is imported when a figure is made, not when this module is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from interp.results.places import Place, index_of, noun
from interp.support.checked import whole_number

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.results.head_table import HeadTable

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
#: up to this many cells, each cell shows its value; above, only the outlined ones show their rank
_CELLS_WITH_VALUES = 160
#: above this many heads a layer, a cell is too narrow for a rank
_HEADS_WITH_RANKS = 48
#: a map of few columns is still this many pixels wide, so that its title fits
_NARROWEST = 256


@dataclass(frozen=True)
class Palette:
    """Colours of a figure: text, axes, cells that were not measured, outlines, and the scale from
    low to high."""

    ink: str
    muted: str
    gap: str
    ring: str
    hover: str
    scale: tuple[tuple[float, str], ...]


LIGHT = Palette(
    ink="#1f2933",
    muted="#5f6b7a",
    gap="#d5d9df",
    ring="#d9480f",
    hover="#ffffff",
    scale=(
        (0.0, "#f5f7fa"),
        (0.25, "#c4d3e4"),
        (0.5, "#7d9cc0"),
        (0.75, "#3d6494"),
        (1.0, "#122f55"),
    ),
)
DARK = Palette(
    ink="#e6e9ee",
    muted="#9aa5b4",
    gap="#3a414c",
    ring="#ff922b",
    hover="#232a34",
    scale=(
        (0.0, "#151b24"),
        (0.25, "#24405f"),
        (0.5, "#41709f"),
        (0.75, "#83add4"),
        (1.0, "#e3effa"),
    ),
)


def number(value: float, digits: int = 2) -> str:
    """A value as people read it, with at most `digits` decimals: "0.98", "12.3", "1,480"; "<0.01"
    for a trace."""
    if not np.isfinite(value):
        return "–"
    size, least = abs(value), 10.0**-digits
    if size == 0:
        return "0"
    if size < least:
        return f"{'<' if value > 0 else '>−'}{least:.{digits}f}"
    if size < 10:
        return f"{value:.{digits}f}"
    return f"{value:.1f}" if size < 100 else f"{value:,.0f}" if size < 1e6 else f"{value:.3g}"


def within(value: str, ends: tuple[float, float] | None) -> str:
    """A number with its interval, "0.31 [−0.02, 0.64]"; as it is where there is none."""
    return value if ends is None else f"{value} [{number(ends[0], 3)}, {number(ends[1], 3)}]"


def heatmap(
    values: np.ma.MaskedArray,
    stderr: np.ma.MaskedArray | None = None,
    *,
    title: str = "",
    subtitle: str = "",
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    tower: str = "",
    outlined: Sequence[tuple[int, int]] = (),
    grain: str = "head",
) -> go.Figure:
    """A layer × head heat map with layer 0 at the top, as `atlas[score]` prints.

    Args:
        values: (layers, heads), masked where not measured; those cells stay grey. Of a grain other
            than heads (layers, key/value heads), or (layers, 1).
        stderr: standard errors of `values`, shown on hover.
        low, high: the colour range; None takes the data's.
        unit: printed over the colour bar.
        tower: prefix of head names on hover.
        outlined: (layer, head) of the heads to point out, strongest first.
        grain: "head", "kv_head" or "layer": what a cell is.
    """
    import plotly.graph_objects as go

    data: np.ma.MaskedArray = np.ma.masked_invalid(np.ma.asarray(values, dtype=float))
    n_layers, n_heads = data.shape
    zmin, zmax = _range(data, low, high)
    prefix = f"{tower}." if tower else ""
    text = [[""] * n_heads for _ in range(n_layers)]
    if data.size <= _CELLS_WITH_VALUES:
        text = [[_in_cell(v) for v in row] for row in data.filled(np.nan)]
    elif n_heads <= _HEADS_WITH_RANKS:
        for rank, (layer, head) in enumerate(outlined, 1):
            text[layer][head] = str(rank)
    errors: np.ma.MaskedArray | None = None if stderr is None else np.ma.masked_invalid(stderr)
    has_error = errors is not None and bool(np.ma.count(errors))
    within = {"head": "H%{x}", "kv_head": "KV%{x}", "layer": ""}[grain]
    hover = f"<b>{prefix}L%{{y}}{within}</b><br>%{{z:.4g}}"
    cell = _cell_height(n_layers)
    width = max(n_heads * 64, _NARROWEST) + 150
    figure = go.Figure(
        go.Heatmap(
            z=data.filled(np.nan),
            x=np.arange(n_heads),
            y=np.arange(n_layers),
            zmin=zmin,
            zmax=zmax,
            xgap=1 if n_heads <= 64 else 0,
            ygap=1 if n_layers <= 64 else 0,
            colorscale=[list(stop) for stop in LIGHT.scale],
            colorbar={
                "title": {"text": unit, "side": "top"},
                "thickness": 12,
                "outlinewidth": 0,
                "len": 1.0,
                "nticks": 6,
                "ticks": "",
            },
            customdata=errors.filled(0.0) if errors is not None and has_error else None,
            hovertemplate=hover + (" ± %{customdata:.2g}" if has_error else "") + "<extra></extra>",
            hoverongaps=False,
            text=text if any(any(row) for row in text) else None,
            texttemplate="%{text}" if any(any(row) for row in text) else None,
            textfont={"size": 11},
        )
    )
    figure.update_layout(
        template="none",
        title={
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 13, "color": LIGHT.muted}},
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 18},
        },
        font={"family": FONT, "size": 12, "color": LIGHT.ink},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor=LIGHT.gap,
        margin={"l": 60, "r": 20, "t": 80, "b": 48},
        width=width if width < 900 else None,
        height=n_layers * cell + 128,
        hoverlabel={"bgcolor": LIGHT.hover, "font": {"family": FONT, "color": LIGHT.ink}},
        xaxis={**_columns(grain, n_heads), "range": [-0.5, n_heads - 0.5]},
        yaxis={**_axis("Layer", n_layers), "range": [n_layers - 0.5, -0.5]},
        shapes=[
            {
                "type": "rect",
                "x0": head - 0.5,
                "x1": head + 0.5,
                "y0": layer - 0.5,
                "y1": layer + 0.5,
                "line": {"color": LIGHT.ring, "width": 2},
            }
            for layer, head in outlined
        ],
    )
    return figure


def of_score(
    table: HeadTable, score: str, tower: str = "", kind: str | None = None, top: int = 10
) -> go.Figure:
    """Heat map of a table's score: a column a head, a row a layer, layer 0 at the top.

    Outlined are the `top` heads that reach the score's threshold; without one, the `top` strongest.
    A score of key/value heads has a column each, a score of layers has one column.
    """
    about = table.about(score)
    where, which = table.panel(score, tower, kind)
    several = len(table.panels(score)) > 1 or len(table.towers) > 1
    names = [
        about.title,
        where if several else "",
        "cross-attention" if which == "cross" else "",
        table.model,
    ]
    one = noun(about.grain)
    subtitle = [] if about.threshold is None else [f"a {one} counts from {number(about.threshold)}"]
    values = table.cells(score, where, which, about.grain)
    marked = to_outline(table, score, top, where, which)
    subtitle += [marked.text] if marked.places else []
    if np.ma.getmaskarray(values).any():
        subtitle.append("grey: not measured")
    return heatmap(
        values,
        table.cells(f"{score}_stderr", where, which, about.grain)
        if f"{score}_stderr" in table.frame
        else None,
        title=" · ".join(n for n in names if n),
        subtitle="; ".join(subtitle),
        low=about.low,
        high=about.high,
        unit=about.unit,
        tower=where,
        outlined=[(place.layer, index_of(place)) for place in marked.places],
        grain=about.grain,
    )


class Outlined(NamedTuple):
    """The places that a map points out, strongest first, and what they are in a phrase."""

    places: list[Place]
    text: str


def to_outline(table: HeadTable, score: str, top: int, tower: str, kind: str) -> Outlined:
    """The strongest `top` that reach the score's threshold; without a threshold the strongest
    `top`, but those at a hundredth of the strongest, which are not worth pointing at."""
    top = whole_number(top, "top, the number of heads that are outlined,")
    about, ranking = table.about(score), table.ranking(score, None, tower, kind)
    if about.threshold is None:
        least = 0.01 * max((abs(value) for _, value, _ in ranking[:top]), default=0.0)
        strongest = [place for place, value, _ in ranking[:top] if abs(value) > least]
        return Outlined(strongest, f"outlined: the strongest {len(strongest)}, by no threshold")
    above = [place for place, value, _ in ranking if value >= about.threshold]
    many = noun(about.grain, several=True)
    if len(above) <= top:
        return Outlined(above, f"outlined: the {len(above)} {many} from there on")
    return Outlined(above[:top], f"outlined: the strongest {top} of the {len(above)} {many}")


def _range(data: np.ma.MaskedArray, low: float | None, high: float | None) -> tuple[float, float]:
    """The colour range: what is fixed, else the data's, never empty."""
    measured = data.compressed()
    zmin = low if low is not None else float(measured.min()) if measured.size else 0.0
    zmax = high if high is not None else float(measured.max()) if measured.size else 1.0
    return (zmin, zmax) if zmax > zmin else (zmin, zmin + 1.0)


def _in_cell(value: float) -> str:
    """Two decimals at most; a cell is no place for "<0.01", its colour says that it is near
    zero."""
    return "" if not np.isfinite(value) else f"{value:.2f}" if abs(value) < 10 else number(value)


def _axis(title: str, n: int) -> dict[str, object]:
    # A tick a cell while they fit, then every 2nd, 4th, 8th, …
    step = 1
    while n / step > 32:
        step *= 2
    return {
        "title": {"text": title, "standoff": 8},
        "tick0": 0,
        "dtick": step,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "fixedrange": n <= 32,
    }


def _columns(grain: str, n: int) -> dict[str, object]:
    """The axis of a layer's places; a whole layer is one column without a number."""
    if grain == "layer":
        return {**_axis("", 1), "showticklabels": False}
    return _axis("Key/value head" if grain == "kv_head" else "Head", n)


def _cell_height(n_layers: int) -> int:
    """Pixels a layer: 34 for small models, 12 for the deepest."""
    return int(min(34, max(12, 900 / max(n_layers, 1))))
