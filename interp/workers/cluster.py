"""`interp.cluster`: scans and searches in many processes, on one machine or on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.circuits.finding import find, pose
from interp.circuits.measured import APART, SHARE, measured
from interp.circuits.methods.circuit_method import Method
from interp.circuits.runs.ability import able
from interp.circuits.runs.prompts import Prompts
from interp.errors import InputError
from interp.evaluation.ablation import ablate
from interp.evaluation.evaluate import evaluate
from interp.loading import load
from interp.results.head_table_files import HEAD
from interp.scan.run import plan_scan
from interp.scan.work import Ahead, Scan
from interp.support.checked import whole_number
from interp.support.checkpoints import Checkpoints, Piece
from interp.support.extras import need
from interp.support.finished import check_replaceable
from interp.support.ownership import owned
from interp.support.progress import Progress, Shown, reporting
from interp.tasks.task import Task
from interp.workers.judging import SharedJudge
from interp.workers.pool import Order, Pool
from interp.workers.shares import (
    Filled,
    Share,
    ablations,
    check_shareable,
    last_of,
    milliseconds,
    onwards,
    recipe_of,
    scratch,
    total_of,
)
from interp.workers.work import ScanWork, Work

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.circuits.circuit import Circuit
    from interp.circuits.known.truth import Truth
    from interp.evaluation.ablation import Ablation
    from interp.results.evaluation import Evaluation
    from interp_hooks.model import HookedModel


def cluster(
    workers: int | None = None, address: str | None = None, *, threads: int | None = None
) -> Cluster:
    """Workers that share scans and searches: processes of this machine, or of a Ray cluster.

    What one process does piece by piece, they do side by side; pieces are merged in the order of
    the one process, so the result is the same to the last digit (with as many threads a worker:
    another number of threads adds in another order).

    Args:
        workers: how many; None for one a GPU, or one a core where there are no GPUs.
        address: of a Ray cluster to join, such as "auto" or "ray://host:10001"; None to start Ray
            on this machine.
        threads: of each worker on a CPU; None for an equal share of this machine's cores, or one on
            a cluster.

    Returns:
        A `Cluster`, to be used in a `with` block.

    Raises:
        MissingExtraError: Ray is not installed (pip install 'interp[ray]').
        InputError: no cluster at the address, or too few cores.

    Example:
        >>> interp.cluster(workers=2)
        Cluster(2 workers)
    """
    need("ray", extra="ray", what="Several workers")
    for what, count in (("workers", workers), ("threads", threads)):
        if count is not None and whole_number(count, what) < 1:
            raise InputError(f"{what} counts from 1, and can't be {count}.")
    return Cluster(workers, address, threads)


class Cluster:
    """Workers that share runs; they are started when the first run needs them.

    This process plans a run, keeps what is finished, and puts it together; workers load the model
    by the name that it was loaded by here, once each.

    Args:
        workers, address, threads: as `cluster` has them.

    Example:
        >>> with interp.cluster(workers=2) as cluster:  # nothing is started before it is needed
        ...     print(cluster)
        Cluster(2 workers)
    """

    def __init__(self, workers: int | None, address: str | None, threads: int | None):
        self._workers, self._address, self._threads = workers, address, threads
        #: the workers, where they have been started
        self.pool: Pool | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()
        self.pool = None

    def __repr__(self) -> str:
        many = "workers" if self._workers is None else f"{self._workers} workers"
        return f"Cluster({many}{'' if self._address is None else f' at {self._address}'})"

    def scan_heads(
        self,
        model: Any,
        scores: str | list[str] = "default",
        *,
        out: str | Path | None = None,
        progress: Shown = True,
        overwrite: bool = False,
        **settings: Any,
    ) -> Atlas:
        """Scores every head of a model, as `interp.scan_heads` does, the inputs shared out.

        Args:
            model: a name or folder, or a model that `interp.load` loaded by one.
            scores, out, progress, overwrite: as there.
            settings: what `interp.plan_scan` takes.

        Returns:
            The `Atlas`, equal to that of one process.

        Raises:
            WorkerError: workers died again and again, or have another model, code or version.
            UnknownNameError, ContextError, InputError, OutputError.
        """
        plan = plan_scan(model, scores, **settings)
        return self.run(plan, None if out is None else Path(out), progress, overwrite)

    @reporting("Scanning")
    def run(
        self, plan: Scan, out: Path | None = None, progress: Shown = None, overwrite: bool = False
    ) -> Atlas:
        """Carries out a planned scan, as `plan.run` does."""
        if out is None:
            with scratch(None) as folder:
                return self.run(plan, folder, progress, overwrite)
        work = ScanWork(plan.scores, plan.settings, plan.extrapolate)
        with owned(out):
            record = plan.record()
            check_replaceable(out / HEAD, record, overwrite)
            started, told = time.time(), onwards(progress)
            lost = self.lost
            store = Checkpoints(out, record)
            with store.resumable():
                share = Share(work, record, plan.pieces(), store)
                done = self._fill(plan.model, [share], told, plan.clock(None).total)
            notes = [*store.notes, *done.notes]
            ahead = Ahead(done.gathered, notes, time.time() - started, self._about(lost))
            return plan.run(out, told, overwrite, ahead)

    @reporting("Finding the circuit")
    def circuit(
        self,
        model: Any,
        task: str | Task | Prompts = "ioi",
        method: str | Method = "head_ablation",
        n: int = 128,
        seed: int = 0,
        *,
        preset: str | None = None,
        format: str | None = None,
        force: bool = False,
        progress: Shown = None,
        resume: str | Path | None = None,
        **settings: Any,
    ) -> Circuit:
        """Finds a circuit by replacing every head in turn, as `interp.circuits.find` does, the
        heads shared out.

        Args:
            model: a name or folder, or a model that `interp.load` loaded by one.
            method: `head_ablation`; other methods take too few runs to be worth sharing, or each
                run needs the one before.
            task, n, seed, preset, format, force, progress, resume, settings: as there.

        Returns:
            The `Circuit`, equal to that of one process.

        Raises:
            InputError: another method; and as `interp.circuits.find`.
            WorkerError: workers died again and again, or have another model, code or version.
        """
        with scratch(resume) as folder:
            search = pose(
                model, task, method, n, seed, preset=preset, format=format, settings=settings
            )
            check_shareable(search.method)
            able(search.model, search.prompts, seed, force)
            share = ablations(search, folder)
            told = onwards(progress)
            lost, began = self.lost, time.time()
            with owned(folder), share.store.resumable():
                self._fill(search.model, [share], told, total_of([share]))
                by = {**self._about(lost), "seconds": round(time.time() - began, 2)}
                found = find(
                    search.model, search.prompts, search.method, n, seed,
                    force=force, progress=last_of(told, total_of([share])), resume=folder,
                )  # fmt: skip
        found.provenance["workers"] = by
        return found

    @reporting("Measuring circuits")
    def measured(
        self,
        model: Any,
        tasks: Sequence[str | Task],
        n: int = 1024,
        seed: int = 0,
        mode: str = "mean",
        share: float = SHARE,
        progress: Shown = None,
        resume: str | Path | None = None,
    ) -> list[Truth]:
        """Measures which heads matter for each of several tasks, as `interp.circuits.measured`
        does, tasks and heads shared out together.

        Args:
            model: a name or folder, or a model that `interp.load` loaded by one.
            tasks: names, or tasks with settings of their own.
            n, seed, mode, share, progress: as there.
            resume: a folder in which finished heads are kept until the end, a folder a task.

        Returns:
            A `Truth` a task, equal to those of one process.

        Raises:
            InputError, FloorError, WorkerError: as `circuit`.
        """
        with scratch(resume) as folder:
            hooked = load(model)
            shares, told = [], onwards(progress)
            for i, task in enumerate(tasks):
                settings = {"mode": mode}
                search = pose(hooked, task, "head_ablation", n, seed + APART, settings=settings)
                able(hooked, search.prompts, seed + APART, False)
                shares.append(ablations(search, folder / f"{i:02d}-{search.prompts.name}"))
            places = [s.store.folder.parent for s in shares if s.store.folder is not None]
            with ExitStack() as stack:
                for place, one in zip(places, shares, strict=True):
                    stack.enter_context(owned(place))
                    stack.enter_context(one.store.resumable())
                self._fill(hooked, shares, told, total_of(shares))
                last = last_of(told, total_of(shares))
                return [
                    measured(hooked, task, n, seed, mode, share, progress=last, resume=place)
                    for task, place in zip(tasks, places, strict=True)
                ]

    def evaluate(self, model: Any, task: str | Task | None = None, **settings: Any) -> Evaluation:
        """Measures right and wrong answers to a task, as `interp.evaluate` does, the problems
        shared out.

        Args:
            model: a name or folder, or a model that `interp.load` loaded by one.
            task: one of the toolkit's own ("niah" if not given); no loss, none with pictures.
            settings: edits, n, seed and what else `interp.evaluate` takes.

        Returns:
            The `Evaluation`, equal to that of one process.

        Raises:
            WorkerError: workers died again and again, or have another model, code or version.
            InputError: what workers don't share; and as `interp.evaluate`.
        """
        lost = self.lost
        found = evaluate(model, task, judging=SharedJudge(self), **settings)
        found.provenance["workers"] = self._about(lost)
        return found

    def ablate(self, model: Any, heads: str | Iterable[Any], **settings: Any) -> Ablation:
        """Ablates heads on a task, beside a random control, as `interp.ablate` does, the problems
        shared out.

        Args:
            model: a name or folder, or a model that `interp.load` loaded by one.
            heads: the heads, in any spelling.
            settings: mode, task, n, seed and what else `interp.ablate` takes.

        Returns:
            The `Ablation`, equal to that of one process.

        Raises:
            WorkerError: workers died again and again, or have another model, code or version.
            HeadError, FloorError, InputError: as `interp.ablate`.
        """
        return ablate(model, heads, judging=SharedJudge(self), **settings)

    def count(self, model: HookedModel) -> int:
        """How many workers there are, started for this model. Raises `InputError` for one that
        they could not have."""
        return self._started(model).workers

    def done(
        self,
        model: HookedModel,
        work: Work,
        record: Mapping[str, Any],
        pieces: Sequence[Piece],
        progress: Progress | None,
    ) -> dict[str, Any]:
        """What the pieces of a run give that no folder keeps, by key; without those for which a
        worker had too little memory."""
        share = Share(work, record, pieces, Checkpoints(None, record))
        return self._fill(model, [share], progress, total_of([share])).gathered

    @property
    def lost(self) -> int:
        """How many workers died so far and were started again."""
        return 0 if self.pool is None else self.pool.lost

    def _fill(
        self, model: HookedModel, shares: Sequence[Share], progress: Progress | None, total: int
    ) -> Filled:
        """Have all pieces done that the stores lack. `total`: of the progress, in milliseconds."""
        recipe = recipe_of(model)
        left = [
            (share, piece)
            for share in shares
            for piece in share.pieces
            if not (piece.saved and share.store.has(piece.key))
        ]
        gathered: dict[str, Any] = {}
        notes: list[str] = []
        done = sum(milliseconds(p) for s in shares for p in s.pieces) - sum(
            milliseconds(p) for _, p in left
        )
        if progress is not None:
            progress(done, total, "workers")
        orders = {Order(s.record["fingerprint"], p.key): (s, p) for s, p in left}
        if not orders:
            return Filled(gathered, notes)
        pool = self._started(model)
        works = {s.record["fingerprint"]: (recipe, s.work) for s, _ in left}
        longest = sorted(orders, key=lambda order: -orders[order][1].seconds)
        for order, answer in pool.run(longest, works):
            share, piece = orders[order]
            if isinstance(answer.error, MemoryError):
                notes.append(
                    f"{piece.key}: memory ran out in a worker, so this process was left to do it."
                )
            elif answer.error is not None:
                raise answer.error
            elif piece.saved:
                share.store.save(piece.key, answer.result)
            else:
                gathered[piece.key] = answer.result
            done += milliseconds(piece)
            if progress is not None:
                progress(min(done, total), total, f"{piece.label}, {pool.workers} workers")
        return Filled(gathered, notes)

    def _started(self, model: HookedModel) -> Pool:
        """The workers; they are started when there is something to do. Raises `InputError` for a
        model that they could not have."""
        recipe_of(model)
        if self.pool is None:
            on_gpu = model.device.type == "cuda"
            self.pool = Pool(self._workers, self._address, self._threads, on_gpu)
        return self.pool

    def _about(self, lost: int) -> dict[str, Any]:
        """Who did the work, for the record, where so many workers were `lost` before; {} where
        nothing was left to do."""
        pool = self.pool
        if pool is None:
            return {}
        return dict(
            workers=pool.workers, threads=pool.threads, gpus=pool.gpus, lost=pool.lost - lost
        )
