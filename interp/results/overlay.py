"""Where heads look in a picture, as data with a figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image


@dataclass(frozen=True)
class Overlay:
    """One token's attention to one picture.

    `picture`: PNG in base64. `prompt`, `token`: what was read, and the token that looks. `maps`:
    head → weights on a grid (rows of patches from the top), A itself; `mass`: head → their sum, the
    head's attention to the image. `sinks`: head → the patches (row, column) that are visual sinks
    on entry of its layer.
    """

    picture: str
    prompt: str
    token: str
    maps: dict[str, list[list[float]]]
    mass: dict[str, float]
    sinks: dict[str, list[tuple[int, int]]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Overlay:
        sinks = {
            head: [(int(r), int(c)) for r, c in marked] for head, marked in data["sinks"].items()
        }
        return cls(**{**data, "sinks": sinks})

    def image(self) -> Image:
        """The picture."""
        from PIL import Image as Pictures

        return Pictures.open(io.BytesIO(base64.b64decode(self.picture))).convert("RGB")

    def figure(self, columns: int = 4) -> go.Figure:
        """The picture, then the same with each head's weights over it (bright: much), its share of
        attention beside the head's name; crosses are visual sinks."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        heads = list(self.maps)
        across = min(columns, len(heads) + 1)
        down = -(-(len(heads) + 1) // across)
        titles = ["the picture", *(f"{h} · {self.mass[h]:.0%} on the image" for h in heads)]
        plot = make_subplots(
            down,
            across,
            subplot_titles=titles,
            horizontal_spacing=0.02,
            vertical_spacing=0.12 / down,
        )
        pixels = np.asarray(self.image())
        height, width = pixels.shape[:2]
        for k in range(len(heads) + 1):
            where = dict(row=k // across + 1, col=k % across + 1)
            plot.add_trace(go.Image(z=pixels, hoverinfo="skip"), **where)
            if k:
                self._draw(plot, heads[k - 1], height, width, where)
            plot.update_xaxes(visible=False, range=[-0.5, width - 0.5], constrain="domain", **where)
            plot.update_yaxes(visible=False, range=[height - 0.5, -0.5], scaleanchor=None, **where)
        plot.update_layout(
            width=220 * across + 40,
            height=250 * down + 60,
            margin=dict(l=16, r=16, t=64, b=16),
            showlegend=False,
            meta=dict(overlay=True),
            title=dict(text=f"Attention of “{self.token}”", font=dict(size=15)),
            font=dict(size=11),
        )
        return plot

    def _draw(
        self, figure: go.Figure, head: str, height: int, width: int, where: dict[str, int]
    ) -> None:
        import plotly.graph_objects as go

        grid = np.array(self.maps[head])
        rows, columns = grid.shape
        x, y = (
            (np.arange(n) + 0.5) * size / n - 0.5 for n, size in ((columns, width), (rows, height))
        )
        top = float(grid.max()) or 1.0
        figure.add_trace(
            go.Heatmap(
                z=grid,
                x=x,
                y=y,
                zmin=0,
                zmax=top,
                showscale=False,
                colorscale=[
                    [0, "rgba(8,12,24,0.62)"],
                    [0.5, "rgba(255,120,0,0.35)"],
                    [1, "rgba(255,235,59,0.75)"],
                ],
                hovertemplate=head + "<br>weight %{z:.4f}<extra></extra>",
            ),
            **where,
        )
        if self.sinks.get(head):
            at = np.array(self.sinks[head])
            marker = dict(symbol="x-thin", size=9, line=dict(width=2, color="#ff2d55"))
            figure.add_trace(
                go.Scatter(x=x[at[:, 1]], y=y[at[:, 0]], mode="markers", marker=marker,
                           hovertemplate="visual sink<extra></extra>"),
                **where,
            )  # fmt: skip
