"""The picture of a circuit as SVG, for pages: a few kilobytes, no script, as wide as the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.circuits.drawing.graph import pitch
from interp.circuits.drawing.layout import ABREAST, AGAINST, FOR, PLAIN, Node
from interp.circuits.drawing.picture import LEFT, WIRES, Picture, picture

if TYPE_CHECKING:
    from interp.results.circuit_table import CircuitTable

#: the class of what has a tint, in the page's style
CLASSES = {FOR: "for", AGAINST: "against", PLAIN: "plain"}
#: SVG's dashes of the input that an edge goes to
DASHES = {"q": "", "k": "9 5", "v": "2 4", "": ""}


@dataclass(frozen=True)
class Room:
    """How much room there is: pixels across, those kept for the layers' names, heads on a line, how
    a layer is named, and the style's class."""

    style: str
    width: int
    margin: int
    abreast: int
    layer: str


#: a wide window, and a telephone held upright
ROOMS = (Room("wide", 820, 64, ABREAST, "layer {}"), Room("narrow", 356, 30, 4, "L{}"))


def drawings(circuit: CircuitTable, heads: int = 12, edges: int = 40) -> dict[str, Any]:
    """What the page's template `circuit/graph.html.j2` takes: a drawing for wide windows and one
    for narrow ones, the legend, and what is said of both. Raises as `picture`."""
    found = [picture(circuit, heads, edges, room.abreast) for room in ROOMS]
    legend = [("towards the answer", "for"), ("against it", "against")] if found[0].ways else []
    return {
        "drawings": [drawing(*pair) for pair in zip(found, ROOMS, strict=True)],
        "tints": {CLASSES[tint]: tint for tint in CLASSES},
        "legend": legend,
        "dashes": [(WIRES[kind], DASHES[kind]) for kind in found[0].kinds],
        "said": found[0].said,
    }


def drawing(found: Picture, room: Room) -> dict[str, Any]:
    """One drawing: its size, and its shapes in the order in which they are painted."""
    step = pitch(found.rows)
    across = (room.width - room.margin - 4) / (found.right - LEFT)

    def at(x: float, y: float) -> tuple[float, float]:
        """Pixels from the upper left corner."""
        return round(room.margin + (x - LEFT) * across, 1), round((found.rows - 0.5 - y) * step, 1)

    return {
        "style": room.style,
        "width": room.width,
        "height": round(found.rows * step),
        "layers": [(room.layer.format(i), at(0, y)[1]) for i, y in found.layers.items()],
        "links": [(*at(*start), *at(*end)) for start, end in found.links],
        "wires": [
            {
                "path": _path([at(x, y) for x, y in zip(wire.x, wire.y, strict=True)]),
                "width": round(wire.width, 2),
                "opacity": round(wire.opacity, 2),
                "dash": DASHES.get(wire.kind, ""),
                "tint": CLASSES[wire.tint],
                "hover": ": ".join(wire.hover),
            }
            for wire in reversed(found.wires)  # the strongest on top
        ],
        "nodes": [_node(n, at(n.x, n.y), wide=room is ROOMS[0]) for n in found.nodes.values()],
    }


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A line through points."""
    return "M" + " L".join(f"{x:g} {y:g}" for x, y in points)


def _node(node: Node, at: tuple[float, float], wide: bool) -> dict[str, Any]:
    """A circle, or the corners of a square or of a diamond."""
    x, y = at
    half = node.size / 2 * (1 if wide else 0.85)
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    }.get(node.symbol, ())
    return {
        "x": x,
        "y": y,
        "radius": round(half, 1),
        "corners": " ".join(f"{x + a * half:g},{y + b * half:g}" for a, b in corners),
        "small": node.symbol != "circle",
        "label": node.label,
        "tint": CLASSES[node.tint],
        "hover": "\n".join(node.hover),
    }
