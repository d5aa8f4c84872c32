"""Curves of faithfulness as SVG, for pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from interp.circuits.judging.curves import Faithfulness

#: pixels: below and left of the axes, above and right of them
BOTTOM, SIDE, TOP, RIGHT = 44, 44, 10, 14
#: at most so many steps on the axis of the metric
STEPS = 6


@dataclass(frozen=True)
class Room:
    """Pixels across and down, and the style's class."""

    style: str
    width: int
    height: int


ROOMS = (Room("wide", 820, 340), Room("narrow", 356, 260))


def drawings(found: Faithfulness) -> dict[str, Any]:
    """What the page's template `circuit/curve.html.j2` takes."""
    curves = [("faithfulness", f"strongest {found.of} kept", "kept")]
    curves += [("completeness", f"strongest {found.of} removed", "removed")]
    curves += [("random", f"random {found.of} kept", "random")] if "random" in found.frame else []
    return {
        "drawings": [_drawing(found, room, curves) for room in ROOMS],
        "legend": [(label, style) for _, label, style in curves],
        "across": f"share of {found.of}",
    }


def _drawing(found: Faithfulness, room: Room, curves: list[tuple[str, str, str]]) -> dict[str, Any]:
    frame = found.frame.sort_values("share")
    bands = [name for name, *_ in curves if f"{name}_low" in frame]
    ends = [name for name, *_ in curves]
    ends += [f"{name}{end}" for name in bands for end in ("_low", "_high")]
    ticks = steps(frame[ends].min(axis=None), frame[ends].max(axis=None))
    low, high = ticks[0], ticks[-1]
    wide, tall = room.width - SIDE - RIGHT, room.height - TOP - BOTTOM

    def x(share: float) -> float:
        return round(SIDE + share * wide, 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * tall, 1)

    def points(shares: Iterable[float], values: Iterable[float]) -> str:
        return " ".join(f"{x(a):g},{y(b):g}" for a, b in zip(shares, values, strict=True))

    return {
        "style": room.style,
        "width": room.width,
        "height": room.height,
        "middle": SIDE + wide / 2,
        "left": x(0),
        "right": x(1),
        "floor": y(low),
        "rows": [(f"{t:g}", y(t)) for t in ticks],
        "columns": [(f"{t:g}", x(t)) for t in (0, 0.25, 0.5, 0.75, 1)],
        "bands": [
            {
                "style": style,
                "points": points(
                    [*frame["share"], *frame["share"][::-1]],
                    [*frame[f"{name}_low"], *frame[f"{name}_high"][::-1]],
                ),
            }
            for name, _, style in curves
            if name in bands
        ],
        "curves": [
            {
                "style": style,
                "points": points(frame["share"], frame[name]),
                "dots": [
                    (x(share), y(value), f"{label}: {k:.0f} of {found.of}, {value:.3f}")
                    for share, value, k in zip(frame["share"], frame[name], frame["k"], strict=True)
                ],
            }
            for name, label, style in curves
        ],
    }


def steps(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` (and 0) to at or above `high` (and 1), evenly apart, few
    of them."""
    low, high = min(0.0, low), max(1.0, high)
    rough = (high - low) / (STEPS - 1)
    size = 10.0 ** np.floor(np.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [round(float(i * step), 10) for i in range(int(first), int(last) + 1)]
