"""Curves of a circuit: the metric with only its strongest part kept, and with only that removed."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.errors import OutputError
from interp.support import typed
from interp.support.files import check_writable, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp.support.jsonable import jsonable
from interp.support.statistics import Interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

CURVE, HEAD = "faithfulness.parquet", "faithfulness.json"
INTERVALS = ("full", "empty", "corrupted")


@dataclass(frozen=True)
class Faithfulness:
    """How far the k strongest heads, or edges, do the task alone, and the others without them.

    `frame` has a row for each k: `k`, `share` = k/N, `margin` with the k strongest kept and
    the others replaced, `faithfulness` = (m(kept) − m(0)) / (m(full) − m(0)), `removed_margin` with
    the k strongest replaced, `completeness` = (m(removed) − m(0)) / (m(full) − m(0)), both with
    `_low` and `_high` (95 %, bootstrap over prompts), and `random`, faithfulness of random orders,
    their mean. m(0): all replaced (`empty`); m(full): none (`full`). `of` says of what: "heads",
    with MLPs live, or "edges", between heads, MLPs, the embedding and the output.

    `cpr` and `cmd` are the areas under faithfulness and under |1 − faithfulness| over the share of
    parts kept, 0 to 1 (`interp.circuits.judging.areas.curve_areas`), and `random_cpr` that of the
    random orders. MIB (Mueller et al. 2025, arXiv 2504.13151) keeps shares of edges and takes
    m(corrupted) for m(0): with `of` "edges" and mode "resample" that is what is measured here, as
    a model without edges is the corrupted run. Of heads by "resample" the two m(0) agree wherever a
    twin ends with the same token; `corrupted` has m(corrupted).

    Example:
        >>> found = interp.circuits.faithfulness(model, circuit, n=8, sizes=[4], orders=0)
        >>> found.of, [int(k) for k in found.frame.k]
        ('heads', [0, 4, 32])
    """

    frame: pd.DataFrame
    cpr: float
    cmd: float
    random_cpr: float | None
    task: str
    mode: str
    full: Interval
    empty: Interval
    corrupted: Interval
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    of: str = "heads"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `faithfulness.parquet` and `faithfulness.json` into `folder`; returns the folder.
        Raises `OutputError`."""
        check_writable(folder)
        target, table = Path(folder), io.BytesIO()
        self.frame.to_parquet(table, index=False)
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frame"}
        for name in INTERVALS:
            said[name] = asdict(said[name])
        said["frame_sha256"] = hashlib.sha256(table.getvalue()).hexdigest()
        write_atomic(target / CURVE, table.getvalue())
        text = json.dumps(jsonable(said), indent=2, ensure_ascii=False)
        write_atomic(target / HEAD, (text + "\n").encode(errors="backslashreplace"))
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Faithfulness:
        """Read what `save` wrote. Raises `OutputError`."""
        source = Path(folder)
        try:
            said = parse((source / HEAD).read_text(encoding="utf-8"))
            table = (source / CURVE).read_bytes()
            if hashlib.sha256(table).hexdigest() != said.pop("frame_sha256"):
                raise OutputError(f"{source / CURVE} is not the one that {HEAD} describes.")
            for name in INTERVALS:
                said[name] = typed.made(Interval, said[name])
            said["notes"] = tuple(typed.texts(said["notes"]))
            return cls(frame=pd.read_parquet(io.BytesIO(table)), **said)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise OutputError(f"No faithfulness in {source} ({missing} is missing).") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"The faithfulness in {source} is damaged ({error}).") from error

    def plot(self) -> go.Figure:
        """Faithfulness, completeness and the random control by k."""
        import plotly.graph_objects as go

        from interp.report.heatmap import FONT, LIGHT

        frame, figure = self.frame, go.Figure()
        blue, grey, ring = LIGHT.scale[3][1], LIGHT.muted, LIGHT.ring
        curves = [
            ("faithfulness", f"strongest {self.of} kept", blue),
            ("completeness", f"strongest {self.of} removed", ring),
        ]
        for name, label, color in curves:
            if f"{name}_low" in frame:
                x = [*frame.share, *frame.share[::-1]]
                y = [*frame[f"{name}_high"], *frame[f"{name}_low"][::-1]]
                band = dict(fill="toself", fillcolor=color, opacity=0.15, line={"width": 0})
                figure.add_trace(go.Scatter(x=x, y=y, hoverinfo="skip", showlegend=False, **band))
            hover = f"<b>%{{customdata}} {self.of}</b><br>%{{y:.3f}}"
            shown = dict(
                mode="lines+markers",
                name=label,
                line={"color": color, "width": 2},
                hovertemplate=hover,
            )
            figure.add_trace(go.Scatter(x=frame.share, y=frame[name], customdata=frame.k, **shown))
        if "random" in frame:
            dotted = dict(
                mode="lines",
                name=f"random {self.of} kept",
                line={"color": grey, "dash": "dot", "width": 2},
            )
            figure.add_trace(go.Scatter(x=frame.share, y=frame.random, **dotted))
        figure.update_layout(
            title={"text": f"Faithfulness on {self.task}", "x": 0, "xanchor": "left"},
            font={"family": FONT, "color": LIGHT.ink},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"l": 60, "r": 20, "t": 60, "b": 48},
            hoverlabel={"bgcolor": LIGHT.hover, "font": {"family": FONT, "color": LIGHT.ink}},
            xaxis={
                "title": {"text": f"share of {self.of}"},
                "range": [0, 1],
                "gridcolor": LIGHT.gap,
                "zeroline": False,
            },
            yaxis={
                "title": {"text": "share of the metric"},
                "gridcolor": LIGHT.gap,
                "zeroline": False,
            },
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        )
        return figure

    def __repr__(self) -> str:
        control = "" if self.random_cpr is None else f", random {self.random_cpr:.2f}"
        return (
            f"Faithfulness({self.task}: CPR {self.cpr:.2f}{control}, CMD {self.cmd:.2f}; "
            f"{self.of}, by {self.mode})"
        )

    def _repr_html_(self) -> str:
        random = {} if self.random_cpr is None else {"CPR of random orders": self.random_cpr}
        facts = {
            "CPR": self.cpr, **random, "CMD": self.cmd, "metric, whole model": self.full,
            f"metric, no {self.of}": self.empty, "metric, corrupted": self.corrupted,
        }  # fmt: skip
        rows = [
            [int(r.k), f"{r.share:.1%}", f"{r.faithfulness:.3f}", f"{r.completeness:.3f}"]
            for r in self.frame.itertuples(index=False)
        ]
        headings = [f"{self.of} kept", "share", "faithfulness", "with them removed"]
        about = f"{self.of} replaced by {self.mode}"
        return block(f"Faithfulness on {self.task}", about, facts, headings, rows, self.notes)
