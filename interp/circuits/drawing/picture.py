"""What is in the picture of a circuit, before anything draws it: nodes with their places, lines
with their weights, and a sentence on how much is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.circuits.drawing.layout import (
    ABREAST,
    AGAINST,
    FOR,
    MLP_X,
    PLAIN,
    Node,
    Tint,
    curve,
    name_of,
    placed,
    readers_of,
    strongest,
)
from interp.errors import InputError
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.results.circuit_table import CircuitTable

#: pixels: the weakest and the strongest edge
THIN, THICK = 1.0, 6.5
WIRES = {"q": "into the query", "k": "into the key", "v": "into the value"}
#: where x begins and ends, without MLPs and with them
LEFT, RIGHT, RIGHT_OF_MLPS = -1.16, 1.16, MLP_X + 0.12


@dataclass(frozen=True)
class Wire:
    """An edge as a line: its points, how wide and how opaque it is, and what it says."""

    sender: str
    receiver: str
    kind: str
    score: float
    x: Sequence[float]
    y: Sequence[float]
    width: float
    opacity: float
    tint: Tint
    hover: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A circuit's strongest heads and edges, placed.

    Attributes:
        nodes: name → node.
        layers: layer → the height of its label.
        links: (x, y) from a key-value head to each query head that reads it.
        wires: the edges, the strongest first.
        rows: lines of nodes, from the bottom.
        right: where x ends; it begins at `LEFT`.
        said: what is shown, of how much.
        ways: whether colours tell which way heads push.
    """

    nodes: Mapping[str, Node]
    layers: Mapping[int, float]
    links: Sequence[tuple[tuple[float, float], tuple[float, float]]]
    wires: Sequence[Wire]
    rows: float
    right: float
    said: str
    ways: bool

    @property
    def kinds(self) -> list[str]:
        """The inputs that edges shown go to, of "q", "k" and "v"."""
        there = {wire.kind for wire in self.wires}
        return [kind for kind in WIRES if kind in there]


def picture(
    circuit: CircuitTable, heads: int = 12, edges: int = 40, abreast: int = ABREAST
) -> Picture:
    """The `heads` strongest heads by layer, up to `abreast` side by side, and the `edges` strongest
    edges between what is shown. Raises `InputError`: fewer than 1 head or 0 edges."""
    if heads < 1 or edges < 0:
        raise InputError(
            f"A graph shows one head or more and no fewer than 0 edges, not {heads} and {edges}."
        )
    members = [h for h in circuit.heads(heads) if circuit.value(h, circuit.column) > 0]
    shown = strongest(circuit, members, edges)
    nodes, lines = placed(circuit, members, shown, abreast)
    return Picture(
        nodes,
        {layer: sum(at) / len(at) for layer, at in lines.items()},
        _links(circuit, nodes),
        _wires(circuit, shown, nodes),
        max((n.y for n in nodes.values()), default=0.0) + 1,
        RIGHT_OF_MLPS if any(n.x == MLP_X for n in nodes.values()) else RIGHT,
        _said(circuit, members, shown),
        f"{circuit.column}_effect" in circuit.frame,
    )


def _wires(circuit: CircuitTable, shown: pd.DataFrame, nodes: Mapping[str, Node]) -> list[Wire]:
    """Widths grow evenly from the weakest edge shown to the strongest."""
    signed = bool((circuit.edges["score"] < 0).any()) if len(circuit.edges) else False
    size = shown["score"].abs()
    most, least = (float(size.max()), float(size.min())) if len(shown) else (1.0, 0.0)

    def wire(row: Any) -> Wire:
        share = (abs(row.score) - least) / (most - least) if most > least else 0.5
        side = {"q": -1, "k": 0, "v": 1}.get(row.kind, 0)
        x, y = curve(nodes[row.sender], nodes[row.receiver], side)
        into = f", {WIRES[row.kind]}" if row.kind in WIRES else ""
        return Wire(
            row.sender,
            row.receiver,
            row.kind,
            float(row.score),
            x,
            y,
            THIN + (THICK - THIN) * share,
            0.5 + 0.45 * share,
            (FOR if row.score > 0 else AGAINST) if signed else PLAIN,
            (f"{row.sender} → {row.receiver}{into}", f"{row.score:.4g}"),
        )

    return [wire(row) for row in shown.itertuples(index=False)]


def _links(
    circuit: CircuitTable, nodes: Mapping[str, Node]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    heads = [Head.parse(n.name) for n in nodes.values() if n.symbol == "circle"]
    return [
        ((node.x, node.y), (nodes[name_of(reader)].x, nodes[name_of(reader)].y))
        for node in nodes.values()
        for reader in readers_of(circuit, node.name, heads)
    ]


def _said(circuit: CircuitTable, chosen: Sequence[Head], shown: pd.DataFrame) -> str:
    few = (
        f"the {len(chosen)} strongest of {len(circuit.frame)} heads"
        if chosen
        else "no head has a score above 0"
    )
    title = circuit.about(circuit.column).title
    if not len(circuit.edges):
        return f"{title}: {few}; the method scores heads one by one and gives no edges"
    return f"{title}: {few}, the {len(shown)} strongest edges between what is shown"
