"""A plan of a scan, carried out: piece by piece, interruptible, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import ActivationError, OutputError
from interp.probes import catalogue as probes
from interp.probes.probe import ProbeBatch
from interp.probes.settings import Settings
from interp.results import starting_tokens
from interp.results.head_table_files import HEAD
from interp.scan.evidence import evidence_of
from interp.scan.massive import CONTEXT, SECONDARY, massive_of
from interp.scan.notes import floors, kept, measured, notes, outcome_name
from interp.scan.pictures import drawn
from interp.scan.plan import Plan
from interp.scores.score import DecodeScore, ModelScore, PassScore, Score
from interp.support.checkpoints import Checkpoints, Piece, Record
from interp.support.finished import check_replaceable, vacant
from interp.support.memory import free, is_out_of_memory
from interp.support.ownership import owned
from interp.support.progress import Clock, Progress, Shown, reporting
from interp.support.provenance import provenance
from interp_hooks.call import STREAMS, Site
from interp_hooks.forward_notes import fetched
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp.atlas import Atlas

OUT_OF_MEMORY = "out of memory"

#: A score, where it was measured, and its (samples, heads) values, still on the device.
_Measured = tuple[Score, Site, torch.Tensor]


@contextmanager
def _spared(missing: dict[str, str], what: str, remarks: list[str]) -> Iterator[None]:
    """A block that the rest can do without: where memory runs out in it, a remark says so."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        missing[what] = OUT_OF_MEMORY
        remarks.append(f"{what}: left out, for memory ran out.")
        free()


@dataclass(frozen=True)
class Job:
    """A piece of work that is saved when done: one batch of a probe, or one score that runs the
    model itself. `group`: the probe or score, `scores`: what is measured in it."""

    key: str
    group: str
    scores: tuple[str, ...]
    label: str
    seconds: float
    run: Callable[[], Iterator[list[Record]]]


@dataclass(frozen=True)
class Ahead:
    """What others did of a scan before it is run here.

    Attributes:
        gathered: "massive" and "evidence", as `Scan.gather` gives them.
        notes: what a reader must know of it.
        seconds: how long they took.
        by: who they were, for the record.
    """

    gathered: Mapping[str, Any]
    notes: Sequence[str]
    seconds: float
    by: Mapping[str, Any]


class Scan(Plan):
    """A plan that can be carried out."""

    def record(self) -> dict[str, Any]:
        """Where the result will come from; its "fingerprint" tells this scan from any other."""
        used = [probes.get(name) for name in self._by_probe]
        batches = [(name, self._batches[name]) for name in self._by_probe]
        return provenance(
            self.model,
            self.settings.seed,
            self._settings(),
            [*self._inputs(), batches],
            [*self.scores, *used],
        )

    def folder(self, usual: Path) -> Path:
        """`usual`, or a name beside it where another scan's result lies or another run works."""
        return vacant(usual, HEAD, self.record())

    def pieces(self) -> list[Piece]:
        """All that can be done in any order, and in other processes: what is saved piece by piece,
        and what is gathered beside it."""
        saved = [Piece(j.key, j.label, j.seconds) for j in self._jobs()]
        gathered = []
        if self._lists_massive:
            gathered.append(("massive", "massive activations"))
        if self._gathers_evidence:
            gathered.append(("evidence", "evidence"))
        seconds = self._finish
        return saved + [Piece(k, label, seconds.get(k, 0.0), False) for k, label in gathered]

    def clock(self, progress: Progress | None) -> Clock:
        """Progress over the pieces and what is done after them."""
        return Clock(progress, [*(j.seconds for j in self._jobs()), *self._finish.values()])

    @torch.no_grad()
    def do(self, key: str) -> Any:
        """The records of the saved piece of that key, or what is gathered under that name."""
        job = next((job for job in self._jobs() if job.key == key), None)
        if job is None:
            return self.gather(key)
        return self._records_of(job, Clock(None, [0.0]))

    def gather(self, what: str, within: Callable[[float], None] = lambda share: None) -> Any:
        """The massive activations, or the evidence, of the scan's texts."""
        if what == "massive":
            return massive_of(self.model, self._brief(), ratio=SECONDARY)
        return evidence_of(self.model, self.settings, within)

    @reporting("Scanning")
    def run(
        self,
        out: Path | None = None,
        progress: Shown = None,
        overwrite: bool = False,
        ahead: Ahead | None = None,
    ) -> Atlas:
        """Do the work. With `out`, each finished piece is saved there, and a second run resumes.

        Where memory runs out in a probe, the other scores are measured all the same: a note and
        `provenance["missing"]` say which are missing, and another run measures those alone.

        Args:
            out: the folder, which one run owns at a time.
            progress: told (done, total, what).
            overwrite: replace a finished result of another scan there.
            ahead: what others did of it, beside the pieces that they left in `out`.

        Raises:
            ActivationError: a layer's activations are not finite.
            OutputError: `out` can't be written, another run works there, or another scan's result
                lies there.
        """
        out = None if out is None else Path(out)
        with owned(out):
            record = self.record()
            if out is not None:
                check_replaceable(out / HEAD, record, overwrite)
            pieces = Checkpoints(out, record)
            with pieces.resumable():
                atlas = self._atlas(record, pieces, progress, out, ahead or Ahead({}, (), 0.0, {}))
        return atlas

    def _atlas(
        self,
        record: dict[str, Any],
        pieces: Checkpoints,
        progress: Progress | None,
        out: Path | None,
        ahead: Ahead,
    ) -> Atlas:
        from interp.atlas import Atlas

        started = time.time()
        jobs = list(self._jobs())
        clock = self.clock(progress)
        missing = self._work(jobs, pieces, clock)
        clock.start("overlays" if self._finish["overlays"] else "summary")
        frames = pieces.records([j.key for j in jobs if j.group not in missing])
        failed = floors(self, frames, missing)
        frames = kept(self, frames, failed)
        frame = self._frame(frames)
        record["seconds"] = round(ahead.seconds + time.time() - started, 2)
        if ahead.by:
            record["workers"] = dict(ahead.by)
        record["measured"] = {s.name: measured(self, s, frames).to_json() for s in self.scores}
        lost = {name: OUT_OF_MEMORY for job in jobs for name in missing.get(job.group, ())}
        own = getattr(self.model.module, "tokenizer", None) is self.model.tokenizer
        said = [*starting_tokens.remark(record, own), *notes(self, frames, failed, lost)]
        atlas = Atlas(frame, record, [*said, *ahead.notes, *pieces.notes])
        with _spared(lost, "overlays", atlas.notes):
            atlas.overlays, said = drawn(atlas, self.model, self.settings, self.scores)
            atlas.notes += said
        clock.finish()
        clock.start("massive activations" if self._lists_massive else "saving")
        if self._lists_massive:
            with _spared(lost, "massive activations", atlas.notes):
                atlas.massive = ahead.gathered.get("massive") or self.gather("massive")
        clock.finish()
        clock.start("evidence" if self._gathers_evidence else "saving")
        if self._gathers_evidence:
            with _spared(lost, "evidence", atlas.notes):
                evidence = ahead.gathered.get("evidence")
                atlas.evidence = evidence or self.gather("evidence", clock.within)
        if lost:
            atlas.provenance["missing"] = lost
        clock.finish()
        clock.start("saving")
        if out is not None:
            self._save(atlas, out)
            if not lost:
                pieces.clear()
        clock.finish()
        return atlas

    def _work(
        self, jobs: Sequence[Job], pieces: Checkpoints, clock: Clock
    ) -> dict[str, tuple[str, ...]]:
        """Do the jobs that are not done; returns the groups in which memory ran out, with their
        scores. Raises what was raised where it did in all of them."""
        missing: dict[str, tuple[str, ...]] = {}
        last: BaseException | None = None
        with torch.no_grad():
            for job in jobs:
                clock.start(job.label)
                # a probe without some of its batches would be averaged over other samples
                if job.group not in missing and not pieces.has(job.key):
                    try:
                        pieces.save(job.key, self._records_of(job, clock))
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        missing[job.group] = job.scores
                        last = error.with_traceback(None)  # its frames hold tensors
                    if last is not None:
                        free()
                clock.finish()
        if last is not None and all(job.group in missing for job in jobs):
            raise last
        return missing

    def _records_of(self, job: Job, clock: Clock) -> list[Record]:
        records: list[Record] = []
        steps = job_steps(self, job) if job.key.startswith("own") else 1
        for i, some in enumerate(job.run()):
            records += some
            if i + 1 < steps:  # a piece is done when it is saved
                clock.within((i + 1) / steps)
        return records

    def _save(self, atlas: Atlas, out: Path) -> None:
        """Save the atlas; where another's is replaced, that one goes first, so that a process
        killed in between leaves no mixture."""
        with suppress(OutputError):
            check_replaceable(out / HEAD, atlas.provenance)
            atlas.save(out)
            return
        (out / HEAD).unlink(missing_ok=True)
        atlas.save(out)

    def _brief(self) -> Settings:
        """These settings with texts of `CONTEXT` tokens at most."""
        return replace(self.settings, context=min(CONTEXT, self.settings.context))

    def _jobs(self) -> Iterator[Job]:
        for name in self._by_probe:
            for i, batch in enumerate(self._batches[name]):
                first = sum(b.samples for b in self._batches[name][:i])
                yield Job(
                    f"{name}-{i:04d}",
                    name,
                    tuple(s.name for s in self._by_probe[name]),
                    probes.get(name).what,
                    self._seconds.get(f"{name}-{i:04d}", 0.0),
                    partial(self._one, name, batch, first),
                )
        for score in self._own:
            job = partial(self._compute, score)
            key = f"own-{score.name}"
            seconds = self._seconds.get(key, 0.0)
            yield Job(key, key, (score.name,), score.title.lower(), seconds, job)

    def _one(self, name: str, batch: ProbeBatch, first: int) -> Iterator[list[Record]]:
        # a probe notes in `info` what it saw; the plan, and its fingerprint, stay as they are
        own = replace(batch, info=dict(batch.info))
        yield self._probe(name, self._by_probe[name], own, first)

    def _compute(self, score: ModelScore) -> Iterator[list[Record]]:
        for step in score.compute(self.model, self.settings):
            yield [
                Record(score.name, i, head.tower, "self", head.layer, head.head, value)
                for head, values in step
                for i, value in enumerate(values)
            ]

    def _question(self, scores: Sequence[Score], batch: ProbeBatch) -> Question:
        """What all the scores ask; on pictures each tower is asked what concerns it."""
        by_tower: dict[str, Question] = {}
        for score in scores:
            by_tower[score.tower] = by_tower.get(score.tower, Question()) | score.ask(batch)
        beside = any(site.is_stream for site in self.model.sites)
        if not any(s.needs_images for s in scores) and not beside:
            return by_tower[""]
        names = frozenset(n for q in by_tower.values() for n in q.names)
        calls = any(q.call for q in by_tower.values())
        silent = Question()
        return SiteQuestion(
            names=names,
            call=calls,
            choose=lambda site: by_tower.get(_tower_asked(self._role(site)), silent),
        )

    def _role(self, site: Site) -> str:
        """The tower that a site is of to scores: "vision" for all of a plain ViT, else its own."""
        return "vision" if site.tower == self._picture_tower else site.tower

    def _probe(
        self, name: str, scores: Sequence[Score], batch: ProbeBatch, first: int
    ) -> list[Record]:
        """Run one batch and turn each layer's statistics into records."""
        found: list[_Measured] = []
        steps: dict[Site, list[LayerStats]] = {}
        decoded = [s for s in scores if isinstance(s, DecodeScore)]
        late = [s for s in scores if isinstance(s, PassScore)]
        now = [s for s in scores if not isinstance(s, (DecodeScore, PassScore))]
        whole: dict[str, list[LayerStats]] = {s.name: [] for s in late}

        def note(stats: LayerStats) -> None:
            if stats.site.kind != "self" or stats.site.is_stream:
                return
            if decoded:
                steps.setdefault(stats.site, []).append(stats)
            for passed in (s for s in late if s.at(self._role(stats.site))):
                whole[passed.name].append(stats)
            for score in (s for s in now if s.at(self._role(stats.site))):
                found.append((score, stats.site, score.measure(stats, batch)))
            if not decoded:
                stats.call = None  # not kept until the forward's end

        probe = probes.get(name)
        probe.run(self.model, batch, self._question(scores, batch), note)
        for site, by_step in steps.items():
            for step in decoded:
                found.append((step, site, step.measure_steps(by_step, batch)))
        for passed in late:
            layers = whole[passed.name]
            for stats, values in zip(layers, passed.measure_pass(layers, batch), strict=True):
                found.append((passed, stats.site, values))
        records = _records(found, first)
        outcome = probe.outcome(batch)
        if outcome is not None:
            records.append(Record(outcome_name(name), first, "", "self", -1, -1, outcome))
        return records

    def _frame(self, records: Any) -> Any:
        """One row a head; means over samples (NaN left out) and standard errors."""
        from interp.results.frame import rows_of

        index = ["tower", "kind", "layer", "head"]
        own = (s for s in self.model.sites if s.kind == "self" and not s.is_stream)
        frame = rows_of(own)
        for score in self.scores:
            mine = records[records.score == score.name]
            values = mine.groupby(index, sort=False)["value"]
            summary = values.mean().rename(score.name).to_frame()
            summary[f"{score.name}_stderr"] = values.sem()
            frame = frame.merge(summary.reset_index(), on=index, how="left")
        return frame


def _tower_asked(role: str) -> str:
    """The tower whose scores ask a site; that of streams beside the text is asked by none."""
    return role if role in ("vision", STREAMS) else ""


def job_steps(plan: Plan, job: Job) -> int:
    """How many results an own-passes job yields, for progress within it."""
    score = next(s for s in plan._own if job.key == f"own-{s.name}")
    return max(1, score.steps(plan.model, plan.settings))


def _records(found: Sequence[_Measured], first: int) -> list[Record]:
    """(samples, heads) values as records, read from the device at once. Infinity is an error; NaN
    means "not defined in this sample"."""
    records: list[Record] = []
    values = fetched([one for _, _, one in found])
    for (score, site, _), of_heads in zip(found, values, strict=True):
        if bool(torch.isinf(of_heads).any()):
            raise ActivationError(
                f"The score {score.name} of layer {site.layer} is infinite; its activations look "
                "broken."
            )
        records += [
            Record(score.name, first + i, site.tower, site.kind, site.layer, h, value)
            for i, row in enumerate(of_heads.tolist())
            for h, value in enumerate(row)
        ]
    return records
