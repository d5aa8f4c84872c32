"""Is a circuit enough, and is it all? The metric with only the strongest heads kept, and with only
them removed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.circuits.judging.areas import curve_areas
from interp.circuits.judging.curves import Faithfulness
from interp.circuits.judging.parts import Edges, Heads, Parts
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, checked, from_task
from interp.errors import InputError
from interp.evaluation.accuracy import sample
from interp.inputs.text import check_seed
from interp.support.progress import Shown, reporting
from interp.support.provenance import inputs_hash, provenance
from interp.support.statistics import bootstrap, resampled_means

if TYPE_CHECKING:
    from interp.tasks.task import Task
    from interp_hooks.model import HookedModel

#: shares of the heads that are kept, MIB's of edges
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: held-out prompts are drawn from this far down the seeds, apart from a calibration's
#: (interp.calibration.splits)
APART = 1 << 21


@reporting("Measuring faithfulness")
def faithfulness(
    model: Any,
    circuit: Any,
    task: str | Task | Prompts | None = None,
    n: int = 128,
    seed: int = 0,
    *,
    of: str = "heads",
    mode: str = "resample",
    sizes: Sequence[int | float] | None = None,
    orders: int = 3,
    column: str | None = None,
    progress: Shown = None,
) -> Faithfulness:
    """Faithfulness of a circuit: the metric with its k strongest heads kept, all others replaced.

    MLPs stay live; and the other way round, the k strongest replaced. With `of="edges"`, the same
    of the edges that a method found: those not kept carry what their sender wrote in the twin.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        circuit: a found `Circuit`, or scores of all heads: a (layers, heads) array, head → score, a
            DataFrame. The highest come first; equal ones in the order of the heads.
        task: a name, a task, or `Prompts` of one's own; None for the circuit's task.
        n: pairs of prompts, other ones than those the circuit was found on.
        of: "heads", or "edges" (a circuit with edges; an edge that its table lacks comes last).
        seed: of the prompts, drawn from a stream apart from `find`'s, and of the random orders.
        mode: what takes a head's place, at every position: its z in the corrupted twin
            ("resample"), its mean over the corrupted prompts ("mean"), 0 ("zero") or the best
            constant ("optimal"); of edges "resample" or "zero".
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
        parts: Parts = (
            Heads(runs, circuit, column, mode) if of == "heads" else Edges(runs, circuit, mode)
        )
        counts = _counts(sizes, len(parts), of)
        rng = np.random.default_rng(seed)
        own = np.arange(len(parts))
        ranks = [own, *(rng.permutation(len(parts)) for _ in range(orders))]
        plan = [
            frozenset(order[k:].tolist()) for order in ranks for k in counts
        ]  # replaced: all but the first k
        removed = [frozenset(range(k)) for k in counts]
        once = list(dict.fromkeys([*plan, *removed]))
        runs.expect(len(once))
        margins = dict(zip(once, parts.without([sorted(s) for s in once]), strict=True))
        corrupted = runs.margins(corrupted=True)
    rows = np.stack([margins[key] for key in plan]).reshape(
        1 + orders, len(counts), -1
    )  # (orders, sizes, n)
    out = np.stack([margins[key] for key in removed])
    empty, full = rows[0, 0], rows[0, -1]
    gap = bootstrap((full - empty).tolist(), seed)
    if gap.low <= 0 <= gap.high:
        raise InputError(
            f"Replacing all {of} ({mode}) changes the metric of {prompts.name} by {gap}: there is "
            "nothing that a "
            "circuit could be faithful to; use more prompts, another mode or another task."
        )
    shares = np.array(counts) / len(parts)
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
        of=of,
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
    full_, empty_, corrupted_ = (bootstrap(m.tolist(), seed) for m in (full, empty, corrupted))
    return Faithfulness(
        frame, cpr, cmd, random_cpr, prompts.name, mode, full_, empty_, corrupted_, record,
        tuple(notes), of,
    )  # fmt: skip


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


def _counts(sizes: Sequence[int | float] | None, n: int, of: str) -> list[int]:
    """Numbers of parts kept, ascending, from 0 to all. Raises `InputError`."""
    counts = {0, n}
    for size in SHARES if sizes is None else sizes:
        count = round(size * n) if isinstance(size, float) else int(size)
        if not 0 <= count <= n or (isinstance(size, float) and not 0 <= size <= 1):
            raise InputError(
                f"A size is a number of {of}, 0 to {n}, or a share (0.0 to 1.0), not {size!r}."
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
