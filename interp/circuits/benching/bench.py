"""Circuit methods on one task, each beside its control, against truths measured in more than one
way."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.circuits.benching.controls.catalogue import controls as registry
from interp.circuits.benching.finished import FinishedRows
from interp.circuits.benching.shuffling import shuffled
from interp.circuits.benching.truths import apart, truth_of
from interp.circuits.finding import find, pose
from interp.circuits.judging.agreement import Agreement, agreement_of, evaluate
from interp.circuits.judging.alignment import aligned
from interp.circuits.judging.parts import edge_scores
from interp.circuits.judging.ranking import auc_of, difference
from interp.circuits.known.truth import Truth
from interp.circuits.methods.catalogue import as_method
from interp.circuits.methods.circuit_method import Method
from interp.circuits.runs.edges import Graph, Stream
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts
from interp.errors import InputError, OutputError
from interp.inputs.text import check_seed
from interp.support.files import check_writable, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp.support.jsonable import jsonable
from interp.support.progress import Shown, reporting
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit
    from interp.tasks.task import Task
    from interp_hooks.model import HookedModel

TABLE, HEAD = "bench.parquet", "bench.json"
#: columns of `Bench.frame` that come from an `Agreement`
AGREED = (
    "auc", "auc_low", "auc_high", "prompts_low", "prompts_high", "auc_pessimistic",
    "average_precision", "chance", "p", "n_positive", "n_heads",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What came of `bench`: a row a method, truth and control.

    `frame` has `method` (as it was called), `truth`, what is `ranked` ("heads", and "edges" where
    the truth lists all of its edges and the method scores them), the agreement (`auc` with
    `auc_low` and `auc_high`, Hanley–McNeil, and `prompts_low` and `prompts_high`, prompts
    resampled; `average_precision` beside its `chance`; `precision` and `recall` at as many heads as
    the truth has), `control` (what was shuffled, "" for a ranking that is a control itself),
    `control_auc` (mean over the draws), `gain` = auc − control_auc with `gain_low` and `gain_high`
    (95 %, heads resampled, paired), `beats` (whether `gain_low` > 0), and what it took:
    `forwards`, `backwards`, `seconds`.

    Example:
        >>> truth = Truth("mine", {Head(2, 3): "x"}, 4, 8, "me")
        >>> found = interp.circuits.bench(model, "ioi", ["attribution"], [truth], n=8, draws=1)
        >>> [row[0] for row in found.table("mine") if row[0] == "attribution"]
        ['attribution']
    """

    frame: pd.DataFrame
    task: str
    model: str
    truths: Mapping[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def beaten(self) -> list[tuple[str, str, str]]:
        """(method, truth, control) of each method that does not beat its shuffled twin."""
        rows = self.frame[(self.frame["control"] != "") & ~self.frame["beats"].astype(bool)]
        return [(r.method, r.truth, r.control) for r in rows.itertuples(index=False)]

    def of(self, truth: str, ranked: str = "heads") -> list[tuple[str, list[Any]]]:
        """(method, its rows of `frame`, one a control) of one truth, of heads or edges; the highest
        AUC first."""
        mine = self.frame[(self.frame["truth"] == truth) & (self.frame["ranked"] == ranked)]
        grouped = mine.groupby("method", sort=False)
        rows = [(str(name), list(some.itertuples(index=False))) for name, some in grouped]
        return sorted(rows, key=lambda pair: -pair[1][0].auc)

    def table(self, truth: str, ranked: str = "heads") -> list[list[str]]:
        """The rows of one truth, of heads or edges, as text: method, AUC with its interval, average
        precision, precision, each control with the gain over it, passes and seconds; the highest
        AUC first."""
        table = []
        for method, some in self.of(truth, ranked):
            first = some[0]
            controls = "; ".join(
                f"{r.control} {r.gain:+.2f} [{r.gain_low:+.2f}, {r.gain_high:+.2f}]"
                + ("" if r.beats else ": not beaten")
                for r in some
                if r.control
            )
            table.append(
                [
                    method,
                    f"{first.auc:.3f} [{first.auc_low:.2f}, {first.auc_high:.2f}]",
                    f"{first.average_precision:.2f}",
                    f"{first.precision:.2f}",
                    controls or "–",
                    f"{first.forwards:.4g} + {first.backwards:.4g}",
                    f"{first.seconds:.1f}",
                ]
            )
        return table

    #: headings of `table`
    HEADINGS = (
        "method", "AUC [95 %]", "AP", "P@k", "gain over shuffled", "forwards + backwards", "s",
    )  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `bench.parquet` and `bench.json` into `folder`; returns it. Raises
        `OutputError`."""
        check_writable(folder)
        target, data = Path(folder), io.BytesIO()
        self.frame.to_parquet(data, index=False)
        write_atomic(target / TABLE, data.getvalue())
        said = {name: getattr(self, name) for name in ("task", "model", "truths", "provenance")}
        said |= {"notes": list(self.notes), "sha256": hashlib.sha256(data.getvalue()).hexdigest()}
        text = json.dumps(jsonable(said), indent=2, ensure_ascii=False) + "\n"
        write_atomic(target / HEAD, text.encode(errors="backslashreplace"))
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bench:
        """What `save` wrote. Raises `OutputError`."""
        source = Path(folder)
        try:
            said = parse((source / HEAD).read_text(encoding="utf-8"))
            data = (source / TABLE).read_bytes()
            if hashlib.sha256(data).hexdigest() != said["sha256"]:
                raise OutputError(f"{source / TABLE} is not the one that {HEAD} describes.")
            return cls(
                pd.read_parquet(io.BytesIO(data)), str(said["task"]), str(said["model"]),
                {str(k): str(v) for k, v in said["truths"].items()}, dict(said["provenance"]),
                tuple(map(str, said["notes"])),
            )  # fmt: skip
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise OutputError(f"There is no bench in {source} ({missing} is missing).") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"The bench in {source} is damaged ({error}); run it again."
            ) from error

    def __repr__(self) -> str:
        n, lost = self.frame["method"].nunique(), len({m for m, _, _ in self.beaten()})
        return (
            f"Bench({self.task} in {self.model}: {n} rankings, {len(self.truths)} truths; {lost} "
            "do not beat a shuffled twin)"
        )

    def _repr_html_(self) -> str:
        parts = [
            block(f"Against {truth}, {ranked}", about, None, self.HEADINGS, rows)
            for truth, about in self.truths.items()
            for ranked in ("heads", "edges")
            if (rows := self.table(truth, ranked))
        ]
        title = block(f"Circuit methods on {self.task} in {self.model}", notes=self.notes)
        return title + "".join(parts)


@reporting("Testing circuit methods")
def bench(
    model: Any,
    task: str | Task = "ioi",
    methods: Sequence[str | Method] | Mapping[str, str | Method] = ("attribution", "eap"),
    truths: Sequence[str | Truth] = ("mean", "resample"),
    n: int = 64,
    seed: int = 0,
    *,
    draws: int = 3,
    truth_prompts: int = 512,
    controls: Sequence[str] | None = None,
    progress: Shown = None,
    resume: str | os.PathLike[str] | None = None,
) -> Bench:
    """Methods on a task, each beside itself on shuffled prompts, and rankings that know nothing.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, or a task with settings of its own.
        methods: names, `Method`s with their settings, or label → either.
        truths: which heads matter: "mean", "resample", "optimal" or "zero" measures it by ablating
            every head that way (`measured`, on prompts that no method sees); or a `Truth`.
        n: pairs of prompts for the methods.
        seed: of the prompts and the shuffles.
        draws: shuffles of each kind; the gain is over their mean.
        truth_prompts: pairs of prompts that truths are measured on.
        controls: rankings that know nothing of the task; None for all there are.
        progress: True for a bar with the time left, or a function (done, total, what).
        resume: a folder in which finished methods and truths are kept until the end, so that an
            interrupted bench goes on.

    Returns:
        A `Bench`. Its rows say of every method whether it beats its shuffled twin.

    Raises:
        InputError, UnknownNameError, FloorError, TapError: as `find`.

    Example:
        >>> found = interp.circuits.bench(
        ...     model, "ioi", ["attribution"], [Truth("mine", {Head(2, 3): "x"}, 4, 8, "me")], n=8
        ... )
        >>> sorted(set(found.frame.control))
        ['', 'labels', 'pairs']
    """
    from interp.loading import load

    check_seed(seed)
    if draws < 1:
        raise InputError(f"A control is drawn at least once, not {draws} times.")
    hooked = load(model)
    wanted = _labelled(methods)
    known = {
        t.name if isinstance(t, Truth) else t: truth_of(
            hooked, task, t, truth_prompts, seed, resume
        )
        for t in truths
    }
    prompts = apart(hooked, task, n, seed, truth_prompts)
    rows: list[dict[str, Any]] = []
    graph = None
    if any(truth.complete_edges for truth in known.values()):
        graph = Stream(PairedRuns(hooked, prompts, seed)).graph
    naive = registry.names() if controls is None else list(controls)
    total = len(wanted) + len(naive)
    finished = FinishedRows(resume, draws, known)
    for done, (label, method) in enumerate([*wanted.items(), *((c, c) for c in naive)]):
        if progress is not None:
            progress(done, total, label)
        searcher = _method(method)
        record = pose(hooked, prompts, searcher, n, seed).record
        some = finished.read(label, record)
        if some is None:
            circuit = find(hooked, prompts, searcher, seed=seed, progress=False)
            twins = {} if label in naive else _twins(hooked, prompts, searcher, seed, draws)
            own = graph if searcher.edges_of == "graph" else None
            some = [
                row
                for name, truth in known.items()
                for row in _rows(label, name, circuit, truth, twins, seed, own)
            ]
            finished.save(label, record, some)
        rows += some
    if progress is not None:
        progress(total, total, "done")
    frame = pd.DataFrame(rows)
    about = dict(
        n=len(prompts), seed=seed, draws=draws, truth_prompts=truth_prompts,
        circuit=record,
    )  # fmt: skip
    result = Bench(
        frame, prompts.name, hooked.name, {name: t.source for name, t in known.items()}, about
    )
    finished.clear()
    return result


def _labelled(methods: Any) -> dict[str, str | Method]:
    if isinstance(methods, Mapping):
        return dict(methods)
    return {m if isinstance(m, str) else m.name: m for m in methods}


def _method(method: str | Method) -> Method:
    if isinstance(method, str) and method in registry.names():
        return registry.get(method).make()
    return as_method(method, None, {})


@dataclass(frozen=True)
class Twin:
    """What a method found with something shuffled."""

    scores: dict[Head, float]
    edges: pd.DataFrame


#: shuffles that are tried for each that is wanted: some leave a method nothing to explain
TRIES = 3


def _twins(
    model: HookedModel, prompts: Prompts, method: Method, seed: int, draws: int
) -> dict[str, list[Twin]]:
    """What was shuffled → what was found then."""

    def run(some: Prompts, how: Method, draw: int) -> Twin:
        with model.clean():
            runs = PairedRuns(model, some, seed + draw)
            found = how.find(runs)
        heads = (Head(h.layer, h.head) for h in runs.heads)
        edges = pd.DataFrame() if found.edges is None else found.edges
        return Twin(dict(zip(heads, found.score.tolist(), strict=True)), edges)

    def drawn(kind: str) -> list[Twin]:
        found, refused = list[Twin](), None
        for draw in range(TRIES * draws):
            try:
                found.append(run(shuffled(prompts, kind, seed + draw), method, draw))
            except InputError as reason:  # shuffled so, the prompts ask for nothing
                refused = reason
            if len(found) == draws:
                return found
        if refused is not None and not found:
            raise refused
        return found

    twins = {kind: drawn(kind) for kind in method.shuffles()}
    own = method.twin()
    if own is not None:
        twins["codes"] = [run(prompts, own, d) for d in range(draws)]
    return twins


def _rows(
    label: str,
    name: str,
    circuit: Circuit,
    truth: Truth,
    twins: Mapping[str, Sequence[Twin]],
    seed: int,
    graph: Graph | None,
) -> list[dict[str, Any]]:
    """The rows of one method against one truth: of heads, and of edges where there are some."""
    _, values, positives = aligned(circuit, truth)
    others = {kind: [aligned(t.scores, truth)[1] for t in some] for kind, some in twins.items()}
    made = [(evaluate(circuit, truth, seed), values, positives, others)]
    if graph is not None and truth.complete_edges and len(circuit.edges):
        whole = {kind: [_edges(graph, t) for t in some] for kind, some in twins.items()}
        table = _edges(graph, circuit)
        labels = truth.edge_labels(table)
        asked = ~np.isnan(labels)
        scores = {
            kind: [t["score"].to_numpy()[asked] for t in some] for kind, some in whole.items()
        }
        own, inside = table["score"].to_numpy()[asked], labels[asked] == 1
        made.append((agreement_of(own, inside, truth, seed, ranked="edges"), own, inside, scores))
    return [row for parts in made for row in _ranked(label, name, circuit, seed, *parts)]


def _edges(graph: Graph, circuit: Circuit | Twin) -> pd.DataFrame:
    """All edges of the graph with the size of a circuit's scores, 0 for those it leaves out; in the
    graph's order."""
    sizes = np.abs(edge_scores(graph, circuit))
    return graph.table(sizes).sort_values(["sender", "receiver", "kind"], ignore_index=True)


def _ranked(
    label: str,
    name: str,
    circuit: Circuit,
    seed: int,
    agreement: Agreement,
    values: np.ndarray,
    positives: np.ndarray,
    twins: Mapping[str, Sequence[np.ndarray]],
) -> list[dict[str, Any]]:
    search, k = circuit.search, agreement.n_positive
    base = {
        "method": label,
        "truth": name,
        "ranked": agreement.ranked,
        **{part: getattr(agreement, part) for part in AGREED},
        "precision": agreement.precision[k],
        "recall": agreement.recall[k],
        "forwards": search.forwards,
        "backwards": search.backwards,
        "seconds": search.seconds,
    }
    none = dict(control="", control_auc=np.nan, gain=np.nan, gain_low=np.nan, gain_high=np.nan)
    if not twins:
        return [{**base, **none, "beats": False}]
    rows = []
    for kind, others in twins.items():
        gain, low, high = difference(values, others, positives, seed)
        mean = float(np.mean([auc_of(o, positives) for o in others]))
        rows.append(
            {
                **base,
                "control": kind,
                "control_auc": mean,
                "gain": gain,
                "gain_low": low,
                "gain_high": high,
                "beats": low > 0,
            }
        )
    return rows
