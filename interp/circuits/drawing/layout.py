"""Which heads and edges of a circuit are drawn, and where: heads by layer, the embedding below, the
answer above."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from interp.report.heatmap import number, within
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.results.circuit_table import CircuitTable

#: nodes side by side before a layer takes another line
ABREAST = 9
#: pixels across: the weakest and the strongest head, MLPs and the two ends, key-value heads
SMALLEST, LARGEST, BOX, GROUP = 40, 62, 40, 30
#: where MLPs stand; heads are between −1 and 1
MLP_X = 1.22
_GROUP = re.compile(r"L(\d+)KV(\d+)")
_MLP = re.compile(r"MLP (\d+)")


@dataclass(frozen=True)
class Tint:
    """The colours of what pushes one way: a line, and the inside of a circle, in light and in
    dark."""

    line: str
    fill: str
    dark_line: str
    dark_fill: str


FOR = Tint("#4a78ad", "#dce8f5", "#6f9fd0", "#1c3553")
AGAINST = Tint("#d9480f", "#fde4d6", "#ff922b", "#4a260c")
PLAIN = Tint("#8592a3", "#eceff3", "#7c8898", "#262e39")


@dataclass(frozen=True)
class Node:
    """A circle, square or diamond: where it is (x, and y in lines from the bottom), how large, and
    what it says."""

    name: str
    label: str
    x: float
    y: float
    size: float
    tint: Tint
    symbol: str
    hover: tuple[str, ...]


def strongest(circuit: CircuitTable, chosen: Sequence[Head], edges: int) -> pd.DataFrame:
    """The rows of `circuit.edges` that are drawn: between the chosen heads, MLPs and the two ends,
    not 0, the largest first."""
    table = circuit.edges
    if not len(table) or not chosen:
        return table.iloc[:0]
    # some methods name the tower, "text.L0H1", and others don't
    table = table.assign(sender=table["sender"].map(_plain), receiver=table["receiver"].map(_plain))
    names = set(map(name_of, chosen))
    groups = {name for name in table["receiver"].unique() if readers_of(circuit, name, chosen)}

    def drawn(name: str) -> bool:
        return (
            name in names
            or name in groups
            or name in ("input", "output")
            or _MLP.fullmatch(name) is not None
        )

    inside = {
        name: drawn(name) for name in {*table["sender"].unique(), *table["receiver"].unique()}
    }
    rows = table[
        table["sender"].map(inside) & table["receiver"].map(inside) & (table["score"] != 0)
    ]
    order = rows["score"].abs().sort_values(ascending=False, kind="stable").index
    return rows.loc[order[:edges]].reset_index(drop=True)


def name_of(head: Head) -> str:
    """A head without its tower's name: a circuit is of one."""
    return f"L{head.layer}H{head.head}"


def _plain(end: str) -> str:
    return end.rpartition(".")[2]


def readers_of(circuit: CircuitTable, name: str, chosen: Sequence[Head]) -> list[Head]:
    """The chosen query heads that read the keys and values of "L2KV1"; none for other names."""
    match = _GROUP.fullmatch(name)
    if match is None:
        return []
    layer, group = int(match[1]), int(match[2])
    rows = circuit.frame[(circuit.frame["layer"] == layer) & (circuit.frame["kv_head"] == group)]
    members = set(rows["head"])
    return [h for h in chosen if h.layer == layer and h.head in members]


def placed(
    circuit: CircuitTable, chosen: Sequence[Head], shown: pd.DataFrame, abreast: int = ABREAST
) -> tuple[dict[str, Node], dict[int, list[float]]]:
    """(name → node, layer → the lines its heads are on), up to `abreast` heads on a line. Layers of
    which nothing is shown take no room."""
    touched = {*shown["sender"], *shown["receiver"]}
    mlps = {int(match[1]): name for name in touched if (match := _MLP.fullmatch(name))}
    groups = {name: readers_of(circuit, name, chosen) for name in touched if _GROUP.fullmatch(name)}
    by_layer: dict[int, list[Head]] = {
        layer: [] for layer in sorted({*(h.layer for h in chosen), *mlps})
    }
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
        mine = sorted(
            name for name, readers in groups.items() if readers and readers[0].layer == layer
        )
        if mine:
            y += 0.15
        lines[layer] = []
        count = max(1, math.ceil(len(members) / abreast))
        rows = [members[i::count] for i in range(count)]
        low = y
        for row in rows:
            xs = spread([_across(h.head, width) for h in row], 2 / (abreast - 1))
            for head, x in zip(row, xs, strict=True):
                nodes[name_of(head)] = _head(circuit, head, x, y, most)
            lines[layer].append(y)
            y += 1
        centres = [
            sum(nodes[name_of(h)].x for h in groups[name]) / len(groups[name]) for name in mine
        ]
        for name, x in zip(mine, spread(centres, 1.12 / (abreast - 1)), strict=True):
            hover = (name, f"key-value head, read by {', '.join(map(name_of, groups[name]))}")
            label = name.rpartition("L")[2].partition("KV")[2]
            nodes[name] = Node(name, f"KV{label}", x, low - 0.55, GROUP, PLAIN, "diamond", hover)
        if layer in mlps:
            name = mlps[layer]
            nodes[name] = Node(
                name,
                name,
                MLP_X,
                y - 1 + (0.36 if members else 0),
                BOX,
                PLAIN,
                "square",
                (name,),
            )
    if "output" in touched:
        nodes["output"] = _end("output", "the final residual stream", y + (0.2 if mlps else 0))
    return nodes, lines


def _end(name: str, what: str, y: float) -> Node:
    return Node(name, name, 0.0, y, BOX, PLAIN, "square", (name, what))


def _head(circuit: CircuitTable, head: Head, x: float, y: float, most: float) -> Node:
    column, effect = circuit.column, f"{circuit.column}_effect"
    row = circuit.frame[
        (circuit.frame["tower"] == head.tower)
        & (circuit.frame["layer"] == head.layer)
        & (circuit.frame["head"] == head.head)
    ].iloc[0]
    unit = f" {circuit.about(column).unit}" if circuit.about(column).unit else ""

    def shown(value: str, name: str) -> str:
        there = f"{name}_low" in row
        return within(value, (row[f"{name}_low"], row[f"{name}_high"]) if there else None)

    hover = [str(head), f"score {shown(f'{number(row[column], 3)}{unit}', column)}"]
    tint = FOR
    if effect in row:
        tint = FOR if row[effect] >= 0 else AGAINST
        way = "towards" if row[effect] >= 0 else "against"
        known = f"{effect}_low" not in row or row[f"{effect}_low"] > 0 or row[f"{effect}_high"] < 0
        way += " the answer" if known else " the answer, if at all"
        hover.append(f"effect {shown(f'{row[effect]:+.3g}', effect)}: {way}")
    size = math.sqrt(SMALLEST**2 + (LARGEST**2 - SMALLEST**2) * row[column] / most)
    return Node(name_of(head), name_of(head), x, y, size, tint, "circle", tuple(hover))


def _across(head: int, heads: int) -> float:
    """A head's place by its number, −1 to 1, as in the heat maps."""
    return 0.0 if heads == 1 else 2 * head / (heads - 1) - 1


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Ascending places as near as can be to those wanted (least squares), at least `apart` from
    each other and, where there is room, within −1 to 1."""
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


def curve(
    sender: Node, receiver: Node, side: int = 0, points: int = 24
) -> tuple[list[float], list[float]]:
    """(x, y) of a line that leaves upwards and arrives from below, bent away from what stands
    between; lines of one pair are told apart by `side`."""
    rise = receiver.y - sender.y
    straight = max(
        0.0, 1 - abs(receiver.x - sender.x) / 0.3
    )  # those that run straight up pass through what is between
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
