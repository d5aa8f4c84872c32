"""Where heads look in a picture, as data with a figure."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image

#: left, top, right, bottom in shares of the picture's width and height
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
#: how near to the picture's edges a grid must come to lie on all of it
NEAR = 0.02
#: pixels of a panel's width, of the lines above it, of what is above all panels, of a picture's
#: side as it is drawn, and of the colour bar beside all panels
PANEL, TITLE, ABOVE, DRAWN, BAR = 220, 40, 88, 320, 64
#: over the picture: dark where a head looks not at all, bright at the largest weight of all heads
SCALE = (
    (0.0, "rgba(8,12,24,0.62)"),
    (0.5, "rgba(255,120,0,0.35)"),
    (1.0, "rgba(255,235,59,0.75)"),
)


class Layer(NamedTuple):
    """Weights on a grid that lies on a part of the picture, and its visual sinks (row, column)."""

    box: Box
    weights: np.ndarray
    sinks: list[tuple[int, int]]

    @property
    def whole(self) -> bool:
        left, top, right, bottom = self.box
        return max(left, top) < NEAR and min(right, bottom) > 1 - NEAR


class Panel(NamedTuple):
    """What is drawn beside the others: its head ("" for the picture alone), its title in lines, and
    the weights that lie over the picture."""

    head: str
    title: str
    layers: list[Layer]


class PictureOverlay(ABC):
    """One token's attention to one picture: what its two kinds share.

    `first`: head → its weight on the prompt's first token, the usual sink ({} in files of versions
    that did not measure it). `word`: the word that the token is about to say, where one was chosen.
    `shown`: which picture it is, where there are several. `by`: the title of the score whose
    strongest heads these are; "" where they were named.
    """

    picture: str
    prompt: str
    token: str
    mass: dict[str, float]
    first: dict[str, float]
    word: str
    shown: str
    by: str

    @property
    def heads(self) -> list[str]:
        """The heads, as they are written."""
        return list(self.mass)

    @abstractmethod
    def layers(self, head: str) -> list[Layer]:
        """A head's weights, grid by grid."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PictureOverlay:
        if "tiles" in data:
            return TiledOverlay.from_json(data)
        return Overlay.from_json(data)

    def image(self) -> Image:
        """The picture."""
        from PIL import Image as Pictures

        return Pictures.open(io.BytesIO(base64.b64decode(self.picture))).convert("RGB")

    @property
    def looker(self) -> str:
        """Where the attention comes from, in words: of “a” before “table”."""
        return f"of “{self.token}”" + (f", before “{self.word}”" if self.word else "")

    def drawn(self) -> tuple[str, int, int]:
        """The picture as an address that holds it, no larger than it is drawn, with its width and
        height."""
        from PIL import Image as Pictures

        picture = Pictures.open(io.BytesIO(base64.b64decode(self.picture)))
        if max(picture.size) <= DRAWN:
            return f"data:image/png;base64,{self.picture}", *picture.size
        small = picture.convert("RGB")
        small.thumbnail((DRAWN, DRAWN))
        file = io.BytesIO()
        small.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", *small.size

    def title(self, head: str, parted: str = " ") -> str:
        """What stands over a head's picture: its weight on the image, and on the first token.

        Example:
            >>> from interp.results.overlay import Overlay
            >>> Overlay("", "", "", {}, {"text.L2H0": 0.62}, {}, first={"text.L2H0": 0.21}).title(
            ...     "text.L2H0"
            ... )
            'L2H0 · 62 % on the image, 21 % on the first token'
        """
        image = f"{_short(head)} · {_percent(self.mass[head])} on the image"
        if head not in self.first:
            return image
        return f"{image},{parted}{_percent(self.first[head])} on the first token"

    def panels(self) -> list[Panel]:
        """The picture, then its heads in order; where a small copy of the whole picture stands
        beside its tiles, it has a panel of its own."""
        made = [Panel("", "the picture", [])]
        for head in self.heads:
            tiles, copies = _parted(self.layers(head))
            made.append(Panel(head, self.title(head, "\n"), tiles))
            for copy in copies:
                share = _percent(float(copy.weights.sum()))
                made.append(Panel(head, f"{_short(head)} · {share} on the small copy", [copy]))
        return made

    @property
    def top(self) -> float:
        """The largest weight of a patch, of all heads: what is bright."""
        every = (float(x.weights.max()) for h in self.heads for x in self.layers(h))
        return max(every, default=1.0) or 1.0

    def figure(self, columns: int = 4) -> go.Figure:
        """The picture, then the same with each head's weights over it (bright: much, on one scale
        for all heads), its share of attention beside the head's name; crosses are visual sinks.
        Where a small copy of the whole picture stands beside its tiles, it has a panel of its
        own."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        panels = self.panels()
        across = min(columns, len(panels))
        down = -(-len(panels) // across)
        source, width, height = self.drawn()
        panel = min(max(PANEL * height / width, PANEL / 4), 2 * PANEL)
        area = panel * down + TITLE * (down - 1)
        plot = make_subplots(
            down,
            across,
            subplot_titles=[panel.title.replace("\n", "<br>") for panel in panels],
            horizontal_spacing=0.02,
            vertical_spacing=TITLE / area if down > 1 else 0,
        )
        for k, (head, _, layers) in enumerate(panels):
            where = dict(row=k // across + 1, col=k % across + 1)
            plot.add_trace(go.Image(source=source, hoverinfo="skip"), **where)
            for layer in layers:
                _draw(plot, head, layer, height, width, where)
            plot.update_xaxes(visible=False, range=[-0.5, width - 0.5], constrain="domain", **where)
            own = f"x{k + 1 if k else ''}"  # proportions stay, however wide the page is
            edges = dict(range=[height - 0.5, -0.5], scaleanchor=own, constrain="domain")
            plot.update_yaxes(visible=False, **edges, **where)
        plot.update_layout(
            width=PANEL * across + 40 + BAR,
            height=round(area) + ABOVE + 16,
            margin=dict(l=16, r=16 + BAR, t=ABOVE, b=16),
            showlegend=False,
            coloraxis=dict(
                cmin=0,
                cmax=self.top,
                colorscale=SCALE,
                colorbar=dict(
                    title="weight", thickness=12, len=1, x=1.01, xpad=4, tickfont_size=10
                ),
            ),
            meta=dict(overlay=True),
            title=dict(text=f"Attention {self.looker}", font=dict(size=15)),
            font=dict(size=11),
        )
        return plot


@dataclass(frozen=True)
class Overlay(PictureOverlay):
    """One token's attention to one picture whose image tokens are one grid.

    `picture`: PNG in base64. `prompt`, `token`: what was read, and the token that looks. `maps`:
    head → weights on a grid (rows of patches from the top), A itself; `mass`: head → the head's
    attention to the image, all its tokens. `sinks`: head → the patches (row, column) that are
    visual sinks on entry of its layer. `box`: the part of the picture that the grid lies on, where
    the model sees no more (left, top, right, bottom in shares of its sides).
    """

    picture: str
    prompt: str
    token: str
    maps: dict[str, list[list[float]]]
    mass: dict[str, float]
    sinks: dict[str, list[tuple[int, int]]]
    box: Box = WHOLE
    first: dict[str, float] = field(default_factory=dict)
    word: str = ""
    shown: str = ""
    by: str = ""

    def layers(self, head: str) -> list[Layer]:
        return [Layer(self.box, np.array(self.maps[head]), self.sinks.get(head, []))]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Overlay:
        sinks = {
            head: [(int(r), int(c)) for r, c in marked] for head, marked in data["sinks"].items()
        }
        left, top, right, bottom = map(float, data.get("box", WHOLE))
        return Overlay(**{**data, "sinks": sinks, "box": (left, top, right, bottom)})


@dataclass(frozen=True)
class TiledOverlay(PictureOverlay):
    """One token's attention to one picture that the model reads as several grids of tokens: tiles,
    and perhaps a small copy of the whole.

    `picture`, `prompt`, `token`, `mass`: as in `Overlay`. `boxes`: the part of the picture that
    each grid lies on (left, top, right, bottom in shares of its sides; beyond 0 … 1 in padding).
    `tiles`: head → weights on each grid, A itself. `sinks`: head → visual sinks (grid, row,
    column).
    """

    picture: str
    prompt: str
    token: str
    boxes: list[Box]
    tiles: dict[str, list[list[list[float]]]]
    mass: dict[str, float]
    sinks: dict[str, list[tuple[int, int, int]]]
    first: dict[str, float] = field(default_factory=dict)
    word: str = ""
    shown: str = ""
    by: str = ""

    @property
    def maps(self) -> dict[str, list[list[float]]]:
        """There is none: no one grid holds the picture. Raises `InputError`."""
        raise InputError(
            f"This picture is read as {len(self.boxes)} grids of tokens, so no one map of it "
            "exists; tiles holds a head's weights grid by grid, boxes where each lies."
        )

    def layers(self, head: str) -> list[Layer]:
        marked = self.sinks.get(head, [])
        return [
            Layer(box, np.array(weights), [(r, c) for k, r, c in marked if k == n])
            for n, (box, weights) in enumerate(zip(self.boxes, self.tiles[head], strict=True))
        ]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TiledOverlay:
        sinks = {
            head: [(int(k), int(r), int(c)) for k, r, c in marked]
            for head, marked in data["sinks"].items()
        }
        boxes = [(float(a), float(b), float(c), float(d)) for a, b, c, d in data["boxes"]]
        return TiledOverlay(**{**data, "sinks": sinks, "boxes": boxes})


def _parted(layers: list[Layer]) -> tuple[list[Layer], list[Layer]]:
    """The grids that are drawn as the picture, and small copies of it: those that lie on all of it
    beside tiles, or beside a finer one (tiles that the model lays together)."""
    whole = [layer for layer in layers if layer.whole]
    tiles = [layer for layer in layers if not layer.whole]
    if not tiles:
        tiles = [max(whole, key=lambda layer: layer.weights.size)]
    return tiles, [layer for layer in whole if layer is not tiles[0]]


def _short(head: str) -> str:
    """A head without its tower: an overlay's are all of the text's."""
    return head.rpartition(".")[2]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _draw(
    figure: go.Figure,
    head: str,
    layer: Layer,
    height: int,
    width: int,
    where: dict[str, int],
) -> None:
    import plotly.graph_objects as go

    rows, columns = layer.weights.shape
    left, above, right, below = layer.box
    x = (left + (np.arange(columns) + 0.5) * (right - left) / columns) * width - 0.5
    y = (above + (np.arange(rows) + 0.5) * (below - above) / rows) * height - 0.5
    figure.add_trace(
        go.Heatmap(
            z=layer.weights,
            x=x,
            y=y,
            dx=(right - left) * width / columns,
            dy=(below - above) * height / rows,
            coloraxis="coloraxis",
            hovertemplate=head + "<br>weight %{z:.4f}<extra></extra>",
        ),
        **where,
    )
    if layer.sinks:
        at = np.array(layer.sinks)
        marker = dict(symbol="x-thin", size=9, line=dict(width=2, color="#ff2d55"))
        figure.add_trace(
            go.Scatter(x=x[at[:, 1]], y=y[at[:, 0]], mode="markers", marker=marker,
                       hovertemplate="visual sink<extra></extra>"),
            **where,
        )  # fmt: skip
