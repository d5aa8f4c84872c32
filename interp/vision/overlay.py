"""Where heads look: one token's attention laid over the picture, head by head, its sinks marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import torch
    from PIL.Image import Image

    from interp_hooks.model import HookedModel

#: pictures are stored with at most this many pixels a side
_STORED = 512


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
        made = make_subplots(
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
            made.add_trace(go.Image(z=pixels, hoverinfo="skip"), **where)
            if k:
                self._draw(made, heads[k - 1], height, width, where)
            made.update_xaxes(visible=False, range=[-0.5, width - 0.5], constrain="domain", **where)
            made.update_yaxes(visible=False, range=[height - 0.5, -0.5], scaleanchor=None, **where)
        made.update_layout(
            width=220 * across + 40,
            height=250 * down + 60,
            margin=dict(l=16, r=16, t=64, b=16),
            showlegend=False,
            meta=dict(overlay=True),
            title=dict(text=f"Attention of “{self.token}”", font=dict(size=15)),
            font=dict(size=11),
        )
        return made

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


def grid_of(model: HookedModel, inputs: Mapping[str, torch.Tensor], tokens: int) -> tuple[int, int]:
    """Rows and columns of an image's `tokens` tokens. Raises `InputError` where they are no grid of
    one picture."""
    grids = inputs.get("image_grid_thw")
    if grids is not None:  # Qwen-VL: of the picture's own shape, merged
        vision = model.module.config.vision_config
        merge = int(getattr(vision, "spatial_merge_size", 1))
        for _, rows, columns in grids.tolist():
            if rows * columns == tokens * merge**2:
                return rows // merge, columns // merge
    side = round(tokens**0.5)
    if side * side != tokens:
        raise InputError(
            f"The {tokens} tokens of this image of {model.name} are no square grid (tiles, or rows "
            "of any length), so "
            "their weights can't be laid over it."
        )
    return side, side


def overlay(
    model: HookedModel,
    picture: Any,
    prompt: str,
    heads: str | Iterable[str | Sequence[int] | Head],
    token: int = -1,
) -> Overlay:
    """What `heads` of the text tower see of `picture` from the token at position `token` of the
    prompt, and which patches are visual sinks there: image tokens whose stream has φ(x) = max_{d in
    D} |x[d]| / RMS(x) ≥ τ, D the dimensions published for the model, or those of its first token's
    massive activations (as the score `visual_sink`).

    Args:
        picture: a picture, or its file. token: counted from the end where negative.

    Raises:
        InputError: a text-only model, no such token, image tokens that are no grid. HeadError: no
            such head.
    """
    import torch

    from interp.vision.prompts import needs_images, read_image, spans, with_images
    from interp.vision.sinks import find_sinks
    from interp_kernels import Received

    needs_images(model, "An overlay of attention")
    shown = read_image(picture) if not hasattr(picture, "convert") else picture.convert("RGB")
    chosen = [model.check(h) for h in parse_heads(heads)]
    chosen = [h if h.tower else Head(h.layer, h.head, model.main_tower) for h in chosen]
    if any(h.tower != model.main_tower for h in chosen):
        raise InputError(
            "An overlay shows heads of the text tower, which look at the image's tokens."
        )
    inputs = with_images(model, prompt, [shown])
    ids = inputs["input_ids"]
    first = inputs.get("attention_mask", torch.ones_like(ids)).int().argmax(1)  # first real token
    if not -ids.shape[1] <= token < ids.shape[1]:
        raise InputError(f"There is no token {token} in a prompt of {ids.shape[1]} tokens.")
    (span, *_), = spans(model, ids)  # fmt: skip
    size = grid_of(model, inputs, span.stop - span.start)
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[0, token] = True
    # What a key receives from one query alone is that query's weight on it.
    question = dict(row=Received(queries=rows, reduce="sum"))
    with (
        torch.no_grad(),
        model.clean(),
        model.capture_resid() as stream,
        model.observe(received=question) as seen,
    ):
        model(**inputs)
    maps, mass, sinks = {}, {}, {}
    for head in chosen:
        record = seen[model.main_tower, head.layer]
        weights = record.received_by("row")[0, head.head, span.start : span.stop].cpu()
        maps[str(head)] = [[float(w) for w in line] for line in weights.view(size)]
        mass[str(head)] = float(weights.sum())
        marked = find_sinks(model, stream["pre", head.layer], first)[0][0, span.start : span.stop]
        sinks[str(head)] = [
            (int(i) // size[1], int(i) % size[1]) for i in marked.nonzero().flatten()
        ]
    word = model.tokenizer.decode(ids[0, token : token + 1 or None]).strip()
    return Overlay(_png(shown), prompt, word, maps, mass, sinks)


def _png(picture: Image) -> str:
    small = picture.copy()
    small.thumbnail((_STORED, _STORED))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
