"""The picture of a circuit: its strongest heads by layer, and who writes to whom.

plotly is imported when a figure is made, not when this module is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.circuits.drawing.layout import (
    AGAINST,
    FOR,
    MLP_X,
    PLAIN,
    Node,
    curve,
    name_of,
    placed,
    readers_of,
    strongest,
)
from interp.errors import InputError
from interp.report.heatmap import DARK, FONT, LIGHT
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.results.circuit_table import CircuitTable

#: pixels: the figure's width, a line of nodes where there are many and few, what is above and below
WIDTH, PITCH, TALLEST, TOP, BOTTOM = 820, 78, 116, 92, 24
#: pixels that the lines of nodes share before they are closer together than `TALLEST`
HEIGHT = 600
#: pixels: the weakest and the strongest edge
THIN, THICK = 1.0, 6.5
DASHES = {"q": "solid", "k": "dash", "v": "dot", "": "solid"}
WIRES = {"q": "into the query", "k": "into the key", "v": "into the value"}


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

    if heads < 1 or edges < 0:
        raise InputError(
            f"A graph shows one head or more and no fewer than 0 edges, not {heads} and {edges}."
        )
    members = circuit.heads(heads)
    members = [h for h in members if circuit.value(h, circuit.column) > 0]
    shown = strongest(circuit, members, edges)
    nodes, lines = placed(circuit, members, shown)
    signed = bool((circuit.edges["score"] < 0).any()) if len(circuit.edges) else False
    plot = go.Figure()
    for trace in (
        *_links(circuit, nodes),
        *_edges(shown, nodes, signed),
        *_nodes(nodes),
        *_legend(circuit, shown),
    ):
        plot.add_trace(trace)
    ticks = {layer: sum(at) / len(at) for layer, at in lines.items()}
    rows = max((n.y for n in nodes.values()), default=0.0) + 1
    height = rows * min(TALLEST, max(PITCH, HEIGHT / rows)) + TOP + BOTTOM
    plot.update_layout(
        template="none",
        title={
            "text": f"{circuit.task} in {circuit.model}",
            "subtitle": {
                "text": said(circuit, members, shown),
                "font": {"size": 13, "color": LIGHT.muted},
            },
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
        xaxis={
            "visible": False,
            "range": [-1.16, 1.34 if any(n.x == MLP_X for n in nodes.values()) else 1.16],
            "fixedrange": True,
        },
        yaxis={
            "tickmode": "array",
            "tickvals": list(ticks.values()),
            "ticktext": [f"layer {layer}" for layer in ticks],
            "range": [-0.5, rows - 0.5],
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "fixedrange": True,
            "tickfont": {"color": LIGHT.muted},
        },
        meta={"dark": dark()},
    )
    return plot


def dark() -> dict[str, str]:
    """Light colour → dark colour, for a figure that says so in its layout's `meta`."""
    colours = {
        getattr(LIGHT, name): getattr(DARK, name)
        for name in ("ink", "muted", "gap", "ring", "hover")
    }
    colours |= {a: b for (_, a), (_, b) in zip(LIGHT.scale, DARK.scale, strict=True)}
    for tint in (FOR, AGAINST, PLAIN):
        colours |= {tint.line: tint.dark_line, tint.fill: tint.dark_fill}
    return colours


def said(circuit: CircuitTable, chosen: Sequence[Head], shown: pd.DataFrame) -> str:
    """What is shown, of how much."""
    few = (
        f"the {len(chosen)} strongest of {len(circuit.frame)} heads"
        if chosen
        else "no head has a score above 0"
    )
    if not len(circuit.edges):
        return (
            f"{circuit.about(circuit.column).title}: {few}; the method scores heads one by one "
            "and gives no edges"
        )
    return (
        f"{circuit.about(circuit.column).title}: {few}, the {len(shown)} strongest edges "
        "between what is shown"
    )


def _edges(shown: pd.DataFrame, nodes: Mapping[str, Node], signed: bool) -> list[Any]:
    """A line an edge, the strongest on top."""
    import plotly.graph_objects as go

    size = shown["score"].abs()
    most, least = (float(size.max()), float(size.min())) if len(shown) else (1.0, 0.0)
    traces = []
    for row in shown.iloc[::-1].itertuples(index=False):
        share = (abs(row.score) - least) / (most - least) if most > least else 0.5
        tint = (FOR if row.score > 0 else AGAINST) if signed else PLAIN
        into = f", {WIRES[row.kind]}" if row.kind in WIRES else ""
        x, y = curve(
            nodes[row.sender], nodes[row.receiver], {"q": -1, "k": 0, "v": 1}.get(row.kind, 0)
        )
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={
                    "width": THIN + (THICK - THIN) * share,
                    "color": tint.line,
                    "dash": DASHES.get(row.kind, "solid"),
                },
                opacity=0.5 + 0.45 * share,
                showlegend=False,
                name=f"{row.sender} → {row.receiver}",
                hovertemplate=f"<b>{row.sender} → "
                f"{row.receiver}</b>{into}<br>{row.score:.4g}<extra></extra>",
                meta={
                    "sender": row.sender,
                    "receiver": row.receiver,
                    "kind": row.kind,
                    "score": float(row.score),
                },
            )
        )
    return traces


def _links(circuit: CircuitTable, nodes: Mapping[str, Node]) -> list[Any]:
    """Thin lines from key-value heads to the query heads that read them."""
    import plotly.graph_objects as go

    heads = [Head.parse(n.name) for n in nodes.values() if n.symbol == "circle"]
    x: list[float | None] = []
    y: list[float | None] = []
    for node in nodes.values():
        for reader in readers_of(circuit, node.name, heads):
            end = nodes[name_of(reader)]
            x += [node.x, end.x, None]
            y += [node.y, end.y, None]
    line = {"width": 1, "color": LIGHT.muted}
    return (
        [go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)]
        if x
        else []
    )


def _nodes(nodes: Mapping[str, Node]) -> list[Any]:
    import plotly.graph_objects as go

    traces = []
    for symbol, name, font in (
        ("square", "others", 10),
        ("diamond", "key-value heads", 9),
        ("circle", "heads", 11),
    ):
        some = [n for n in nodes.values() if n.symbol == symbol]
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
                hovertext=[n.hover for n in some],
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
                name=name,
                customdata=[n.name for n in some],
                cliponaxis=False,
            )
        )
    return traces


def _legend(circuit: CircuitTable, shown: pd.DataFrame) -> list[Any]:
    """Which colour is which way, which dashes which input."""
    import plotly.graph_objects as go

    entries: list[tuple[str, dict[str, Any]]] = []
    if f"{circuit.column}_effect" in circuit.frame:
        for label, tint in (("towards the answer", FOR), ("against it", AGAINST)):
            marker = {"size": 13, "color": tint.fill, "line": {"width": 2, "color": tint.line}}
            entries.append((label, {"mode": "markers", "marker": marker}))
    for kind in "qkv":
        if len(shown) and (shown["kind"] == kind).any():
            line = {"color": PLAIN.line, "width": 2, "dash": DASHES[kind]}
            entries.append((WIRES[kind], {"mode": "lines", "line": line}))
    return [
        go.Scatter(x=[None], y=[None], name=label, hoverinfo="skip", **how)
        for label, how in entries
    ]
