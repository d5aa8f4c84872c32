"""The page of one head on one text: tokens to point at, a strip of the whole text, two tables.

One file with everything in it. Its numbers are 16-bit, base64: 32k tokens stay under 3 MB.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report.heatmap import number
from interp.report.templating import asset, rendered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    class Looked(Protocol):
        """What the page needs of a look."""

        model: str
        head: str
        tokens: list[str]
        views: dict[str, Any]
        provenance: dict[str, Any]
        notes: list[str]


#: the largest 16-bit number: no key, where it stands for a place
NONE = 0xFFFF
#: arrays of a view that are shares, and those that are scaled to their largest value
SHARES = ("weights", "values", "first", "value_first", "from_weights")
SCALED = ("entropy", "received", "moved", "key_norm")
PLACES = ("keys", "value_keys", "queries")
#: pixels of the frame in a notebook
HEIGHT = 560


def render(look: Looked) -> str:
    """The page as HTML."""
    return rendered(
        "look/page.html.j2",
        look=look,
        title=f"{look.head} of {look.model}",
        facts=facts(look),
        data=data(look),
        style=asset("look/look.css"),
        script=asset("look/look.js"),
    )


def framed(look: Looked) -> str:
    """The page in a frame, as Jupyter shows it: its style and script keep to themselves."""
    return (
        f'<iframe srcdoc="{html.escape(render(look), quote=True)}" width="100%" height="{HEIGHT}" '
        f'style="border:0" title="{html.escape(f"{look.head} of {look.model}")}"></iframe>'
    )


def facts(look: Looked) -> dict[str, str]:
    """What the head does on the whole text, by name."""
    v, said = look.views["own"], look.provenance
    rows = slice(1, None)  # the first token sees itself alone
    some = len(look.tokens) > 1
    return {
        "Tokens": f"{len(look.tokens):,}",
        "On the first token": f"{float(v.first[rows].mean()):.0%}" if some else "",
        "By value": f"{float(v.value_first[rows].mean()):.0%}" if some else "",
        "Entropy": f"{number(float(v.entropy[rows].mean()))} nats" if some else "",
        "Edits": " · ".join(said.get("edits") or said.get("settings", {}).get("edits", ())),
    }


def data(look: Looked) -> dict[str, Any]:
    """What the page's script reads."""
    wide = len(look.tokens) >= NONE
    return dict(
        tokens=look.tokens,
        wide=wide,
        views={name: packed(view, wide) for name, view in look.views.items()},
    )


def packed(view: Any, wide: bool) -> dict[str, Any]:
    """A view's arrays, base64: shares of 1 and scaled numbers in 16 bits, places in 16 or 32."""
    said: dict[str, Any] = dict(k=view.keys.shape[1], r=view.queries.shape[1])
    for name in PLACES:
        places = getattr(view, name).astype(np.int64)
        none = 0xFFFFFFFF if wide else NONE
        said[name] = _base64(np.where(places < 0, none, places), "<u4" if wide else "<u2")
    for name in SHARES:
        said[name] = _base64(_sixteen(getattr(view, name), 1.0), "<u2")
    scales: Mapping[str, float] = {n: float(np.max(getattr(view, n), initial=0.0)) for n in SCALED}
    for name, scale in scales.items():
        said[name] = _base64(_sixteen(getattr(view, name), scale), "<u2")
    said["scales"] = scales
    return said


def _sixteen(values: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(np.clip(values / (scale or 1.0), 0, 1) * 0xFFFF)


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()
