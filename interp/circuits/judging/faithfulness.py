"""Is a circuit enough, and is it all? The metric with only the strongest heads kept, and with only
them removed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.circuits.judging.alignment import scores_by_head
from interp.circuits.judging.areas import curve_areas
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, checked, from_task
from interp.errors import InputError, OutputError
from interp.evaluation.accuracy import sample
from interp.inputs.text import check_seed
from interp.support import typed
from interp.support.files import check_writable, write_atomic
from interp.support.json_text import parse
from interp.support.jsonable import jsonable
from interp.support.progress import Shown, reporting
from interp.support.provenance import inputs_hash, provenance
from interp.support.statistics import Interval, bootstrap, resampled_means
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.tasks.task import Task
    from interp_hooks.model import HookedModel

#: shares of the heads that are kept, MIB's of edges
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: held-out prompts are drawn from this far down the seeds, apart from a calibration's
#: (interp.calibration.splits)
APART = 1 << 21


CURVE, HEAD = "faithfulness.parquet", "faithfulness.json"
INTERVALS = ("full", "empty", "corrupted")


@dataclass(frozen=True)
class Faithfulness:
    """How far the k strongest heads do the task alone, and the others without them.

    `frame` has a row for each k: `k`, `share` = k/N, `margin` with the k strongest heads kept and
    the others replaced, `faithfulness` = (m(kept) − m(0)) / (m(full) − m(0)), `removed_margin` with
    the k strongest replaced, `completeness` = (m(removed) − m(0)) / (m(full) − m(0)), both with
    `_low` and `_high` (95 %, bootstrap over prompts), and `random`, faithfulness of random orders,
    their mean. m(0): all heads replaced (`empty`); m(full): none (`full`).

    `cpr` and `cmd` are the areas under faithfulness and under |1 − faithfulness| over the share of
    heads kept, 0 to 1 (`interp.circuits.judging.areas.curve_areas`), and `random_cpr` that of
    the random orders. MIB (Mueller et al. 2025, arXiv 2504.13151) keeps shares of edges and takes
    m(corrupted) for m(0), so numbers here compare with each other, not with MIB's. By "resample"
    the two m(0) agree wherever a twin ends with the same token: the last position's stream is then
    its embedding and the corrupted heads'; `corrupted` has m(corrupted).
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
            ("faithfulness", "strongest heads kept", blue),
            ("completeness", "strongest heads removed", ring),
        ]
        for name, label, color in curves:
            if f"{name}_low" in frame:
                x = [*frame.share, *frame.share[::-1]]
                y = [*frame[f"{name}_high"], *frame[f"{name}_low"][::-1]]
                band = dict(fill="toself", fillcolor=color, opacity=0.15, line={"width": 0})
                figure.add_trace(go.Scatter(x=x, y=y, hoverinfo="skip", showlegend=False, **band))
            hover = "<b>%{customdata} heads</b><br>%{y:.3f}"
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
                name="random heads kept",
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
                "title": {"text": "share of heads"},
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
            f"Faithfulness({self.task}: CPR {self.cpr:.2f}{control}, CMD {self.cmd:.2f}; heads, "
            f"by {self.mode})"
        )


@reporting("Measuring faithfulness")
def faithfulness(
    model: Any,
    circuit: Any,
    task: str | Task | Prompts | None = None,
    n: int = 128,
    seed: int = 0,
    *,
    mode: str = "resample",
    sizes: Sequence[int | float] | None = None,
    orders: int = 3,
    column: str | None = None,
    progress: Shown = None,
) -> Faithfulness:
    """Faithfulness of a circuit: the metric with its k strongest heads kept, all others replaced.

    MLPs stay live; and the other way round, the k strongest replaced.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        circuit: a found `Circuit`, or scores of all heads: a (layers, heads) array, head → score, a
            DataFrame. The highest come first; equal ones in the order of the heads.
        task: a name, a task, or `Prompts` of one's own; None for the circuit's task.
        n: pairs of prompts, other ones than those the circuit was found on.
        seed: of the prompts, drawn from a stream apart from `find`'s, and of the random orders.
        mode: what takes a head's place, at every position: its z in the corrupted twin
            ("resample"), its mean over the corrupted prompts ("mean") or 0 ("zero").
        sizes: whole numbers of heads, or shares (floats); None for MIB's shares. 0 and all heads
            are always among them.
        orders: random orders that make the control; 0 for none.
        column: of a DataFrame, the column of the scores.
        progress: True for a bar with the time left, or a function (done, total, what).

    Returns:
        A `Faithfulness`: the curves over sizes, and the areas under them.

    Raises:
        InputError: a head without a score, prompts that the circuit was found on, or a metric that
            does not depend on the heads (the interval of m(full) − m(0) holds 0).
        UnknownNameError, ContextError.

    Example:
        >>> found = interp.circuits.faithfulness(model, circuit, n=8, sizes=[4], orders=0)
        >>> type(found).__name__, found.mode
        ('Faithfulness', 'resample')
    """
    from interp.loading import load

    check_seed(seed)
    hooked = load(model)
    with hooked.clean():
        prompts, notes = _apart(hooked, circuit, task, n, seed)
        started = time.perf_counter()
        runs = PairedRuns(hooked, prompts, seed, progress)
        ranking = _ranking(runs, circuit, column)
        counts = _counts(sizes, len(ranking))
        rng = np.random.default_rng(seed)
        random = [[ranking[i] for i in rng.permutation(len(ranking))] for _ in range(orders)]
        plan = [
            frozenset(order[k:]) for order in (ranking, *random) for k in counts
        ]  # replaced: all but the first k
        removed = [frozenset(ranking[:k]) for k in counts]
        margins = _margins(runs, [*plan, *removed], mode)
        corrupted = runs.margins(corrupted=True)
    rows = np.stack([margins[key] for key in plan]).reshape(
        1 + orders, len(counts), -1
    )  # (orders, sizes, n)
    out = np.stack([margins[key] for key in removed])
    empty, full = rows[0, 0], rows[0, -1]
    gap = bootstrap((full - empty).tolist(), seed)
    if gap.low <= 0 <= gap.high:
        raise InputError(
            f"Replacing all heads ({mode}) changes the metric of {prompts.name} by {gap}: there is "
            "nothing that a "
            "circuit could be faithful to; use more prompts, another mode or another task."
        )
    shares = np.array(counts) / len(ranking)
    frame = pd.DataFrame({"k": counts, "share": shares, "margin": rows[0].mean(1)})
    frame = frame.assign(
        **_curve("faithfulness", rows[0], empty, full, seed), removed_margin=out.mean(1)
    )
    frame = frame.assign(**_curve("completeness", out, empty, full, seed))
    random_cpr = None
    if orders:
        frame["random"] = (rows[1:].mean((0, 2)) - empty.mean()) / gap.mean
        random_cpr = curve_areas(shares, frame.random.to_numpy())[0]  # type: ignore[arg-type]
    cpr, cmd = curve_areas(shares, frame.faithfulness.to_numpy())  # type: ignore[arg-type]
    settings = dict(
        task=prompts.name,
        n=len(prompts),
        mode=mode,
        sizes=counts,
        orders=orders,
        backend=hooked.backend,
    )
    record = provenance(hooked, seed, settings, prompts.tensors())
    record["seconds"], record["forwards"] = (
        round(time.perf_counter() - started, 3),
        round(runs.forwards, 3),
    )
    return Faithfulness(
        frame, cpr, cmd, random_cpr, prompts.name, mode, bootstrap(full.tolist(), seed),
        bootstrap(empty.tolist(), seed), bootstrap(corrupted.tolist(), seed), record, tuple(notes),
    )  # fmt: skip


def _margins(
    runs: PairedRuns, sets: Sequence[frozenset[Head]], mode: str
) -> dict[frozenset[Head], np.ndarray]:
    """set → (n,) margins on the clean prompts with these heads replaced; each set runs once."""
    once = list(dict.fromkeys(sets))
    runs.expect(len(once))
    return dict(
        zip(once, runs.ablated([sorted(s) for s in once], mode, "Faithfulness"), strict=True)
    )


def _curve(
    name: str, rows: np.ndarray, empty: np.ndarray, full: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """The share (m − m(0)) / (m(full) − m(0)) of rows (sizes, n), and its interval under resampled
    prompts."""
    means = resampled_means(
        np.stack([*rows, empty, full]), seed
    )  # (sizes + 2, resamples), the same draws for all
    bottom, width = means[-2], means[-1] - means[-2]
    shares = (means[:-2] - bottom) / np.where(width == 0, np.finfo(float).tiny, width)
    low, high = np.quantile(shares, [0.025, 0.975], axis=1)
    value = (rows.mean(1) - empty.mean()) / (full.mean() - empty.mean())
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _ranking(runs: PairedRuns, circuit: Any, column: str | None) -> list[Head]:
    """The model's heads, highest score first. Raises `InputError` for heads without a finite
    score."""
    scores = scores_by_head(circuit, column)
    values = [scores.get(Head(h.layer, h.head), np.nan) for h in runs.heads]
    lacking = [str(h) for h, v in zip(runs.heads, values, strict=True) if not np.isfinite(v)]
    if lacking or len(scores) != len(runs.heads):
        what = (
            f"{', '.join(lacking[:5])} have no finite score"
            if lacking
            else "there are scores of other heads too"
        )
        raise InputError(
            f"Faithfulness needs one score for each head of {runs.model.name}, and {what}."
        )
    return [runs.heads[i] for i in np.argsort(-np.array(values), kind="stable")]


def _counts(sizes: Sequence[int | float] | None, n: int) -> list[int]:
    """Numbers of heads kept, ascending, from 0 to all. Raises `InputError`."""
    counts = {0, n}
    for size in SHARES if sizes is None else sizes:
        count = round(size * n) if isinstance(size, float) else int(size)
        if not 0 <= count <= n or (isinstance(size, float) and not 0 <= size <= 1):
            raise InputError(
                f"A size is a number of heads, 0 to {n}, or a share (0.0 to 1.0), not {size!r}."
            )
        counts.add(count)
    return sorted(counts)


# --- prompts that the circuit has not seen
# ------------------------------------------------------------------------


def _apart(
    model: HookedModel, circuit: Any, task: str | Task | Prompts | None, n: int, seed: int
) -> tuple[Prompts, list[str]]:
    """Prompts, none of which the circuit was found on as far as that is known, and what is to be
    said about it."""
    record = getattr(circuit, "provenance", None) or {}
    search = getattr(circuit, "search", None)
    if task is None:
        if search is None or search.task == "prompts":
            raise InputError(
                "Say on which task: faithfulness(model, scores, task=…) or prompts of one's own."
            )
        task = search.task
    search_ids = None if search is None else _seen(model, task, record)
    if isinstance(task, Prompts):
        shared = record.get("inputs_hash") == inputs_hash(task.recorded())
        if shared or any(i.ids in (search_ids or ()) for i in task.instances):
            raise InputError(
                "The circuit was found on some of these prompts; a circuit is judged on others, so "
                "give other prompts."
            )
        return task, []
    notes = []
    if search is not None and search_ids is None:
        notes.append(
            "The prompts that the circuit was found on could not be made again (another task or "
            "other settings), so "
            "that none of them is among these is not checked."
        )
    chosen = sample(model, task, n, seed)[0].task
    by_ids: dict[tuple[int, ...], Any] = {}
    for spare in (1, 2, 4):
        for instance in from_task(model, chosen, spare * n, seed + APART).instances:
            if instance.ids not in (search_ids or ()):
                by_ids.setdefault(instance.ids, instance)
        if len(by_ids) >= n:
            return checked(Prompts(chosen, tuple(by_ids.values())[:n])), notes
    raise InputError(
        f"The task {chosen.name} has only {len(by_ids)} prompts beside those that the circuit was "
        f"found on, and {n} "
        "were asked for; use fewer."
    )


def _seen(
    model: HookedModel, task: str | Task | Prompts, record: dict[str, Any]
) -> set[tuple[int, ...]] | None:
    """The prompts that a circuit was found on, made again by its record; None where that can't be
    done."""
    number, seed = record.get("settings", {}).get("n"), record.get("seed")
    if not isinstance(number, int) or not isinstance(seed, int):
        return None
    source = task.task if isinstance(task, Prompts) else task
    try:
        prompts = from_task(model, source, number, seed)
    except InputError:  # prompts that someone wrote
        return None
    return (
        {i.ids for i in prompts.instances}
        if inputs_hash(prompts.recorded()) == record.get("inputs_hash")
        else None
    )
