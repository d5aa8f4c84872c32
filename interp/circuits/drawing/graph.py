"""The picture of a circuit as a plotly figure, for notebooks.

plotly is imported when a figure is made, not when this module is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.circuits.drawing.layout import AGAINST, FOR, PLAIN
from interp.circuits.drawing.picture import LEFT, WIRES, Picture, picture
from interp.report.heatmap import FONT, LIGHT

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.results.circuit_table import CircuitTable

#: pixels: the figure's width, a line of nodes where there are many and few, what is above and below
WIDTH, PITCH, TALLEST, TOP, BOTTOM = 820, 78, 116, 92, 24
#: pixels that the lines of nodes share before they are closer together than `TALLEST`
HEIGHT = 600
DASHES = {"q": "solid", "k": "dash", "v": "dot", "": "solid"}


def figure(circuit: CircuitTable, heads: int = 12, edges: int = 40) -> go.Figure:
    """The `heads` strongest heads of a circuit by layer, and the `edges` strongest edges between
    what is shown.

    A head's area is its score, its colour which way it pushes, where the method tells
    (`<method>_effect`). A line's width grows with the edge's weight, from the weakest shown to the
    strongest; its dashes are the input it goes to (queries, keys, values). MLPs, the embedding
    ("input") and the final stream ("output") are shown where an edge shown touches them; so are
    key-value heads ("L2KV1") of which a query head is shown, with a thin line to those heads. Heads
    without a score above 0 are not shown.

    Raises:
        InputError: a number of heads or edges below 1 or 0.
    """
    import plotly.graph_objects as go

    found, plot = picture(circuit, heads, edges), go.Figure()
    for trace in (*_links(found), *_edges(found), *_nodes(found), *_legend(found)):
        plot.add_trace(trace)
    height = found.rows * pitch(found.rows) + TOP + BOTTOM
    plot.update_layout(
        template="none",
        title={
            "text": f"{circuit.task} in {circuit.model}",
            "subtitle": {"text": found.said, "font": {"size": 13, "color": LIGHT.muted}},
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 18},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 16},
        },
        font={"family": FONT, "size": 12, "color": LIGHT.ink},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": TOP, "b": BOTTOM},
        width=WIDTH,
        height=round(height),
        hoverlabel={
            "bgcolor": LIGHT.hover,
            "font": {"family": FONT, "color": LIGHT.ink},
            "align": "left",
        },
        hovermode="closest",
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
            "font": {"size": 12},
        },
        xaxis={"visible": False, "range": [LEFT, found.right], "fixedrange": True},
        yaxis={
            "tickmode": "array",
            "tickvals": list(found.layers.values()),
            "ticktext": [f"layer {layer}" for layer in found.layers],
            "range": [-0.5, found.rows - 0.5],
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "fixedrange": True,
            "tickfont": {"color": LIGHT.muted},
        },
    )
    return plot


def pitch(rows: float) -> float:
    """Pixels from a line of nodes to the next."""
    return min(TALLEST, max(PITCH, HEIGHT / rows))


def _hover(lines: tuple[str, ...]) -> str:
    return "<br>".join((f"<b>{lines[0]}</b>", *lines[1:]))


def _edges(found: Picture) -> list[Any]:
    """A line an edge, the strongest on top."""
    import plotly.graph_objects as go

    return [
        go.Scatter(
            x=wire.x,
            y=wire.y,
            mode="lines",
            line={
                "width": wire.width,
                "color": wire.tint.line,
                "dash": DASHES.get(wire.kind, "solid"),
            },
            opacity=wire.opacity,
            showlegend=False,
            name=f"{wire.sender} → {wire.receiver}",
            hovertemplate=f"{_hover(wire.hover)}<extra></extra>",
            meta={
                "sender": wire.sender,
                "receiver": wire.receiver,
                "kind": wire.kind,
                "score": wire.score,
            },
        )
        for wire in reversed(found.wires)
    ]


def _links(found: Picture) -> list[Any]:
    """Thin lines from key-value heads to the query heads that read them."""
    import plotly.graph_objects as go

    if not found.links:
        return []
    x: list[float | None] = []
    y: list[float | None] = []
    for start, end in found.links:
        x += [start[0], end[0], None]
        y += [start[1], end[1], None]
    line = {"width": 1, "color": LIGHT.muted}
    return [go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)]


def _nodes(found: Picture) -> list[Any]:
    import plotly.graph_objects as go

    traces = []
    for symbol, name, font in (
        ("square", "others", 10),
        ("diamond", "key-value heads", 9),
        ("circle", "heads", 11),
    ):
        some = [n for n in found.nodes.values() if n.symbol == symbol]
        if not some:
            continue
        traces.append(
            go.Scatter(
                x=[n.x for n in some],
                y=[n.y for n in some],
                mode="markers+text",
                text=[n.label for n in some],
                textfont={"size": font, "color": LIGHT.ink},
                marker={
                    "size": [n.size for n in some],
                    "symbol": symbol,
                    "color": [n.tint.fill for n in some],
                    "line": {"width": 2, "color": [n.tint.line for n in some]},
                    "opacity": 1,
                },
                hovertext=[_hover(n.hover) for n in some],
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
                name=name,
                customdata=[n.name for n in some],
                cliponaxis=False,
            )
        )
    return traces


def _legend(found: Picture) -> list[Any]:
    """Which colour is which way, which dashes which input."""
    import plotly.graph_objects as go

    entries: list[tuple[str, dict[str, Any]]] = []
    if found.ways:
        for label, tint in (("towards the answer", FOR), ("against it", AGAINST)):
            marker = {"size": 13, "color": tint.fill, "line": {"width": 2, "color": tint.line}}
            entries.append((label, {"mode": "markers", "marker": marker}))
    for kind in found.kinds:
        line = {"color": PLAIN.line, "width": 2, "dash": DASHES[kind]}
        entries.append((WIRES[kind], {"mode": "lines", "line": line}))
    return [
        go.Scatter(x=[None], y=[None], name=label, hoverinfo="skip", **how)
        for label, how in entries
    ]
