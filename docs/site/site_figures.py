"""Heat maps of heads as SVG, as in the reports: a row a layer, layer 0 at the top, a column a head;
to stand in a page of the site."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

#: from low to high; and for signed values, 0 in the middle: the colours of the reports
SEQUENTIAL = ("#f5f7fa", "#c4d3e4", "#7d9cc0", "#3d6494", "#122f55")
DIVERGING = ("#1f4e8c", "#7fa6d6", "#f5f7fa", "#f0a878", "#b4430c")
#: width and height of a cell, and room for labels
WIDE, HIGH, LEFT, TOP, BELOW = 30, 13, 34, 6, 52

Row = Sequence[float | None]


def heat_map(
    values: Sequence[Row],
    name: str,
    span: tuple[float, float] | None = None,
    threshold: float | None = None,
) -> str:
    """One SVG of (layers, heads) values; hovering a cell tells its head and value.

    Args:
        values: a row a layer; None where not measured.
        name: what is drawn, for readers who don't see it.
        span: the ends of the colour scale; None: those of the data, symmetric if signed.
        threshold: heads from here on are outlined.
    """
    low, high = span or _span(values)
    signed = low < 0 < high
    layers, heads = len(values), max(map(len, values))
    width, height = max(LEFT + heads * WIDE + 4, 290), TOP + layers * HIGH + BELOW
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}, by layer and '
        f'head" style="max-width:{width}px">'
    ]
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            parts.append(_cell(layer, head, value, (low, high), signed, threshold))
    base = TOP + layers * HIGH
    for layer in range(0, layers, 5 if layers > 12 else 1):
        parts.append(_text(LEFT - 5, TOP + layer * HIGH + HIGH - 2, f"L{layer}", "end"))
    for head in range(0, heads, 2 if heads > 12 else 1):
        parts.append(_text(LEFT + head * WIDE + WIDE / 2, base + 15, f"H{head}", "middle"))
    parts += _legend(width, base + 30, low, high, signed)
    return "".join(parts) + "</svg>"


def number(value: float) -> str:
    """A value for readers: 0.07, 12.3, 447, 14,500; a true minus sign."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.095 or size == 0 else 3
    return f"{value:,.{digits}f}".replace("-", "−")


def _span(values: Sequence[Row]) -> tuple[float, float]:
    there = [v for row in values for v in row if v is not None]
    low, high = min(there, default=0.0), max(there, default=1.0)
    if low < 0 < high:
        far = max(-low, high)
        return -far, far
    return min(low, 0.0), max(high, low + 1e-9)


def _cell(
    layer: int,
    head: int,
    value: float | None,
    span: tuple[float, float],
    signed: bool,
    threshold: float | None,
) -> str:
    place = f'x="{LEFT + head * WIDE}" y="{TOP + layer * HIGH}"'
    if value is None:
        return f'<rect {place} class="none"><title>L{layer}H{head}: no value</title></rect>'
    counts = ' class="on"' if threshold is not None and value >= threshold else ""
    fill = _colour((value - span[0]) / (span[1] - span[0]), DIVERGING if signed else SEQUENTIAL)
    said = f"L{layer}H{head} {number(value)}"
    return f'<rect {place}{counts} fill="{fill}"><title>{said}</title></rect>'


def _colour(share: float, anchors: Sequence[str]) -> str:
    """The colour at `share` of the way through the anchors."""
    at = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in anchors[i : i + 2]]
    mixed = (round(a + (at - i) * (b - a)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(said)}</text>'


def _legend(width: int, y: int, low: float, high: float, signed: bool) -> list[str]:
    """A bar of colours with its ends, to the right below the map."""
    anchors, steps, wide = (DIVERGING if signed else SEQUENTIAL), 20, 6
    start = width - steps * wide - 60
    bar = [
        f'<rect x="{start + i * wide}" y="{y}" class="scale" '
        f'fill="{_colour(i / (steps - 1), anchors)}"/>'
        for i in range(steps)
    ]
    return [
        _text(start - 6, y + 12, number(low), "end"),
        *bar,
        _text(start + steps * wide + 6, y + 12, number(high), "start"),
    ]
