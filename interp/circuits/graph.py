"""The picture of a circuit: its strongest heads by layer, the embedding below, the answer above, and who writes to whom.

plotly is imported when a figure is made, not when this module is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.errors import InputError
from interp.plots import DARK, FONT, LIGHT, number
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.circuits.result import Circuit

#: pixels: the figure's width, a line of nodes where there are many and few, what is above and below
WIDTH, PITCH, TALLEST, TOP, BOTTOM = 820, 78, 116, 92, 24
#: pixels that the lines of nodes share before they are closer together than `TALLEST`
HEIGHT = 600
#: nodes side by side before a layer takes another line
ABREAST = 9
#: pixels across: the weakest and the strongest head, MLPs and the two ends, key-value heads
SMALLEST, LARGEST, BOX, GROUP = 40, 62, 40, 30
#: pixels: the weakest and the strongest edge
THIN, THICK = 1.0, 6.5
#: where MLPs stand; heads are between −1 and 1
MLP_X = 1.22
DASHES = {"q": "solid", "k": "dash", "v": "dot", "": "solid"}
WIRES = {"q": "into the query", "k": "into the key", "v": "into the value"}
_GROUP = re.compile(r"(?:\w+\.)?L(\d+)KV(\d+)")
_MLP = re.compile(r"MLP (\d+)")


@dataclass(frozen=True)
class Tint:
    """The colours of what pushes one way: a line, and the inside of a circle, in light and in dark."""

    line: str
    fill: str
    dark_line: str
    dark_fill: str


FOR = Tint("#4a78ad", "#dce8f5", "#6f9fd0", "#1c3553")
AGAINST = Tint("#d9480f", "#fde4d6", "#ff922b", "#4a260c")
PLAIN = Tint("#8592a3", "#eceff3", "#7c8898", "#262e39")


@dataclass(frozen=True)
class Node:
    """A circle, square or diamond: where it is (x, and y in lines from the bottom), how large, and what it says."""

    name: str
    label: str
    x: float
    y: float
    size: float
    tint: Tint
    symbol: str
    hover: str


def figure(circuit: Circuit, heads: int = 12, edges: int = 40) -> go.Figure:
    """The `heads` strongest heads of a circuit by layer, and the `edges` strongest edges between what is shown.

    A head's area is its score, its colour which way it pushes, where the method tells (`<method>_effect`). A line's
    width grows with the edge's weight, from the weakest shown to the strongest; its dashes are the input it goes to (queries, keys, values). MLPs, the embedding ("input")
    and the final stream ("output") are shown where an edge shown touches them; so are key-value heads ("L2KV1") of
    which a query head is shown, with a thin line to those heads. Heads without a score above 0 are not shown.

    Raises:
        InputError: a number of heads or edges below 1 or 0.
    """
    import plotly.graph_objects as go

    if heads < 1 or edges < 0:
        raise InputError(f"A graph shows one head or more and no fewer than 0 edges, not {heads} and {edges}.")
    chosen = circuit.heads(heads)
    chosen = [h for h in chosen if circuit.value(h, circuit.column) > 0]
    shown = strongest(circuit, chosen, edges)
    nodes, lines = placed(circuit, chosen, shown)
    signed = bool((circuit.edges["score"] < 0).any()) if len(circuit.edges) else False
    drawn = go.Figure()
    for trace in (*_links(circuit, nodes), *_edges(shown, nodes, signed), *_nodes(nodes), *_legend(circuit, shown)):
        drawn.add_trace(trace)
    ticks = {layer: sum(at) / len(at) for layer, at in lines.items()}
    rows = max((n.y for n in nodes.values()), default=0.0) + 1
    height = rows * min(TALLEST, max(PITCH, HEIGHT / rows)) + TOP + BOTTOM
    drawn.update_layout(
        template="none",
        title={
            "text": f"{circuit.task} in {circuit.model}",
            "subtitle": {"text": said(circuit, chosen, shown), "font": {"size": 13, "color": LIGHT.muted}},
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
        hoverlabel={"bgcolor": LIGHT.hover, "font": {"family": FONT, "color": LIGHT.ink}, "align": "left"},
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "itemclick": False,
                "itemdoubleclick": False, "font": {"size": 12}},
        xaxis={"visible": False, "range": [-1.16, 1.34 if any(n.x == MLP_X for n in nodes.values()) else 1.16],
               "fixedrange": True},
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
    )  # fmt: skip
    return drawn


def dark() -> dict[str, str]:
    """Light colour → dark colour, for a figure that says so in its layout's `meta`."""
    found = {getattr(LIGHT, name): getattr(DARK, name) for name in ("ink", "muted", "gap", "ring", "hover")}
    found |= {a: b for (_, a), (_, b) in zip(LIGHT.scale, DARK.scale, strict=True)}
    for tint in (FOR, AGAINST, PLAIN):
        found |= {tint.line: tint.dark_line, tint.fill: tint.dark_fill}
    return found


def said(circuit: Circuit, chosen: Sequence[Head], shown: pd.DataFrame) -> str:
    """What is shown, of how much."""
    few = f"the {len(chosen)} strongest of {len(circuit.frame)} heads" if chosen else "no head has a score above 0"
    if not len(circuit.edges):
        return f"{circuit.about(circuit.column).title}: {few}; the method scores heads one by one and gives no edges"
    return f"{circuit.about(circuit.column).title}: {few}, the {len(shown)} strongest edges between what is shown"


def strongest(circuit: Circuit, chosen: Sequence[Head], edges: int) -> pd.DataFrame:
    """The rows of `circuit.edges` that are drawn: between the chosen heads, MLPs and the two ends, not 0, the largest
    first."""
    table = circuit.edges
    if not len(table) or not chosen:
        return table.iloc[:0]
    names = set(map(str, chosen))
    groups = {name for name in table["receiver"].unique() if _readers(circuit, name, chosen)}

    def drawn(name: str) -> bool:
        return name in names or name in groups or name in ("input", "output") or _MLP.fullmatch(name) is not None

    known = {name: drawn(name) for name in {*table["sender"].unique(), *table["receiver"].unique()}}
    kept = table[table["sender"].map(known) & table["receiver"].map(known) & (table["score"] != 0)]
    order = kept["score"].abs().sort_values(ascending=False, kind="stable").index
    return kept.loc[order[:edges]].reset_index(drop=True)


def _readers(circuit: Circuit, name: str, chosen: Sequence[Head]) -> list[Head]:
    """The chosen query heads that read the keys and values of "L2KV1"; none for other names."""
    found = _GROUP.fullmatch(name)
    if found is None:
        return []
    layer, group = int(found[1]), int(found[2])
    rows = circuit.frame[(circuit.frame["layer"] == layer) & (circuit.frame["kv_head"] == group)]
    members = set(rows["head"])
    return [h for h in chosen if h.layer == layer and h.head in members]


# --- where everything stands ------------------------------------------------------------------------------------------


def placed(
    circuit: Circuit, chosen: Sequence[Head], shown: pd.DataFrame
) -> tuple[dict[str, Node], dict[int, list[float]]]:
    """(name → node, layer → the lines its heads are on). Layers of which nothing is shown take no room."""
    touched = {*shown["sender"], *shown["receiver"]}
    mlps = {int(found[1]): name for name in touched if (found := _MLP.fullmatch(name))}
    groups = {name: _readers(circuit, name, chosen) for name in touched if _GROUP.fullmatch(name)}
    by_layer: dict[int, list[Head]] = {layer: [] for layer in sorted({*(h.layer for h in chosen), *mlps})}
    for head in sorted(chosen):
        by_layer[head.layer].append(head)
    most = max((circuit.value(h, circuit.column) for h in chosen), default=1.0)
    width = int(circuit.frame["head"].max()) + 1
    nodes: dict[str, Node] = {}
    lines: dict[int, list[float]] = {}
    y = 0.0
    if "input" in touched:
        nodes["input"] = _end("input", "the embedding", y)
        y += 1
    for layer, members in by_layer.items():
        mine = sorted(name for name, readers in groups.items() if readers and readers[0].layer == layer)
        if mine:
            y += 0.15
        lines[layer] = []
        rows = [members[i :: _count(members)] for i in range(_count(members))]
        low = y
        for row in rows:
            xs = spread([_across(h.head, width) for h in row], 2 / (ABREAST - 1))
            for head, x in zip(row, xs, strict=True):
                nodes[str(head)] = _head(circuit, head, x, y, most)
            lines[layer].append(y)
            y += 1
        wanted = [sum(nodes[str(h)].x for h in groups[name]) / len(groups[name]) for name in mine]
        for name, x in zip(mine, spread(wanted, 0.14), strict=True):
            hover = f"<b>{name}</b><br>key-value head, read by {', '.join(map(str, groups[name]))}"
            label = name.rpartition("L")[2].partition("KV")[2]
            nodes[name] = Node(name, f"KV{label}", x, low - 0.55, GROUP, PLAIN, "diamond", hover)
        if layer in mlps:
            name = mlps[layer]
            nodes[name] = Node(
                name, name, MLP_X, y - 1 + (0.42 if members else 0), BOX, PLAIN, "square", f"<b>{name}</b>"
            )
    if "output" in touched:
        nodes["output"] = _end("output", "the final residual stream", y + (0.2 if mlps else 0))
    return nodes, lines


def _count(members: Sequence[Head]) -> int:
    return max(1, math.ceil(len(members) / ABREAST))


def _end(name: str, what: str, y: float) -> Node:
    return Node(name, name, 0.0, y, BOX, PLAIN, "square", f"<b>{name}</b><br>{what}")


def _head(circuit: Circuit, head: Head, x: float, y: float, most: float) -> Node:
    column, effect = circuit.column, f"{circuit.column}_effect"
    row = circuit.frame[
        (circuit.frame["tower"] == head.tower)
        & (circuit.frame["layer"] == head.layer)
        & (circuit.frame["head"] == head.head)
    ].iloc[0]
    unit = f" {circuit.about(column).unit}" if circuit.about(column).unit else ""
    hover = f"<b>{head}</b><br>score {number(row[column], 3)}{unit}"
    if f"{column}_low" in row:
        hover += f" [{number(row[f'{column}_low'], 3)}, {number(row[f'{column}_high'], 3)}]"
    tint = FOR
    if effect in row:
        tint = FOR if row[effect] >= 0 else AGAINST
        hover += f"<br>effect {row[effect]:+.3f}: {'towards' if row[effect] >= 0 else 'against'} the answer"
    size = math.sqrt(SMALLEST**2 + (LARGEST**2 - SMALLEST**2) * row[column] / most)
    return Node(str(head), f"L{head.layer}H{head.head}", x, y, size, tint, "circle", hover)


def _across(head: int, heads: int) -> float:
    """A head's place by its number, −1 to 1, as in the heat maps."""
    return 0.0 if heads == 1 else 2 * head / (heads - 1) - 1


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Ascending places as near as can be to those wanted (least squares), at least `apart` from each other and, where
    there is room, within −1 to 1."""
    # with the gaps subtracted, this is a monotone regression: pool neighbours that are out of order
    blocks: list[list[float]] = []
    for i, x in enumerate(wanted):
        blocks.append([x - i * apart])
        while len(blocks) > 1 and _mean(blocks[-2]) >= _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [_mean(block) for block in blocks for _ in block]
    room = 1 - (len(wanted) - 1) * apart
    return [max(-1.0, min(x, room)) + i * apart for i, x in enumerate(level)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- what is drawn ----------------------------------------------------------------------------------------------------


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
        x, y = curve(nodes[row.sender], nodes[row.receiver], {"q": -1, "k": 0, "v": 1}.get(row.kind, 0))
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
                hovertemplate=f"<b>{row.sender} → {row.receiver}</b>{into}<br>{row.score:.4g}<extra></extra>",
                meta={"sender": row.sender, "receiver": row.receiver, "kind": row.kind, "score": float(row.score)},
            )
        )
    return traces


def _links(circuit: Circuit, nodes: Mapping[str, Node]) -> list[Any]:
    """Thin lines from key-value heads to the query heads that read them."""
    import plotly.graph_objects as go

    heads = [Head.parse(n.name) for n in nodes.values() if n.symbol == "circle"]
    x: list[float | None] = []
    y: list[float | None] = []
    for node in nodes.values():
        for reader in _readers(circuit, node.name, heads):
            end = nodes[str(reader)]
            x += [node.x, end.x, None]
            y += [node.y, end.y, None]
    line = {"width": 1, "color": LIGHT.muted}
    return [go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)] if x else []


def curve(sender: Node, receiver: Node, side: int = 0, points: int = 24) -> tuple[list[float], list[float]]:
    """(x, y) of a line that leaves upwards and arrives from below, bent away from what stands between; lines of one
    pair are told apart by `side`."""
    rise = receiver.y - sender.y
    straight = max(0.0, 1 - abs(receiver.x - sender.x) / 0.3)  # those that run straight up pass through what is between
    aside = -1 if sender.x > 0.5 or -0.5 < sender.x < 0 else 1  # not out of the picture
    bend = aside * straight * 0.16 * min(3.0, max(0.0, rise - 1)) + 0.05 * side
    x0, y0, x3, y3 = sender.x, sender.y, receiver.x, receiver.y
    x1, y1, x2, y2 = x0 + bend, y0 + 0.45 * rise, x3 + bend, y3 - 0.45 * rise
    xs, ys = [], []
    for i in range(points):
        t = i / (points - 1)
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        xs.append(a * x0 + b * x1 + c * x2 + d * x3)
        ys.append(a * y0 + b * y1 + c * y2 + d * y3)
    return xs, ys


def _nodes(nodes: Mapping[str, Node]) -> list[Any]:
    import plotly.graph_objects as go

    traces = []
    for symbol, name, font in (("square", "others", 10), ("diamond", "key-value heads", 9), ("circle", "heads", 11)):
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


def _legend(circuit: Circuit, shown: pd.DataFrame) -> list[Any]:
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
    return [go.Scatter(x=[None], y=[None], name=label, hoverinfo="skip", **how) for label, how in entries]
