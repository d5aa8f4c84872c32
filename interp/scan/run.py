"""Scan every head for the chosen scores in the fewest forward passes; interruptible, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import ActivationError, ContextError, InputError, TapError
from interp.inputs.text import check_context, forward, read_text, rows_of_text
from interp.probes.probe import PROBES, ProbeBatch, Settings
from interp.scores.catalogue import select
from interp.scores.score import DecodeScore, ModelScore, PassScore, Score
from interp.support.checkpoints import Partial, Record
from interp.support.progress import timed
from interp.support.provenance import provenance
from interp.vision import pictures
from interp.vision.prompts import needs_images, takes_images
from interp_hooks.call import Site
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.vision.overlay import Overlay
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]

DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Job:
    """A piece of work that is saved when done: one batch of a probe, or one score that runs the
    model itself."""

    key: str
    label: str
    tokens: int
    run: Callable[[], Iterator[list[Record]]]


class Plan:
    """What a scan will do. `rows`: (probe, what it measures, passes); `seconds`, `gigabytes`:
    estimates."""

    def __init__(
        self,
        model: HookedModel,
        scores: Sequence[Score],
        settings: Settings,
        extrapolate: bool = False,
    ):
        check_context(model, settings.context, extrapolate)
        if settings.samples < 1 or settings.context < 32:
            raise InputError("A scan needs at least 1 sample and a context of at least 32 tokens.")
        self.model, self.scores, self.settings, self.extrapolate = (
            model,
            list(scores),
            settings,
            extrapolate,
        )
        self.notes: list[str] = []
        self._by_probe: dict[str, list[Score]] = {}
        for score in scores:
            if not isinstance(score, ModelScore):
                self._by_probe.setdefault(score.probe, []).append(score)
        self._batches: dict[str, list[ProbeBatch]] = {}
        for name in list(self._by_probe):
            try:
                self._batches[name] = PROBES[name].make(model, settings)
            except (
                InputError,
                ContextError,
            ) as reason:  # this model can't be posed that problem: other scores stand
                if isinstance(reason, ContextError) and name != "image":
                    raise
                if len(self._by_probe) == 1 and len(scores) == len(self._by_probe[name]):
                    raise
                self.notes += [
                    f"{s.name}: not measured. {reason}" for s in self._by_probe.pop(name)
                ]
        self.notes += _unknown_words(model.tokenizer, self._batches.get("text", []))
        self._own: list[ModelScore] = []
        self._cost: dict[str, int] = {}
        for own in (s for s in scores if isinstance(s, ModelScore)):
            try:
                self._cost[own.name] = own.cost(model, settings)
                self._own.append(own)
            except (InputError, ContextError, TapError) as reason:
                if len(scores) == 1 or not (own.needs_images or isinstance(reason, TapError)):
                    raise
                self.notes.append(f"{own.name}: not measured. {reason}")
        self.rows = self._describe()
        self.seconds, self.gigabytes = self._estimate()

    def _describe(self) -> list[tuple[str, str, str]]:
        rows = []
        for name, scores in self._by_probe.items():
            batches = self._batches[name]
            longest = max(b.input_ids.shape[1] for b in batches)
            steps = (
                f" + {len(batches[0].info['instance'].accept)} steps" if name == "needle" else ""
            )
            passes = f"{len(batches)} × {longest} tokens{steps}"
            rows.append((PROBES[name].what, ", ".join(s.name for s in scores), passes))
        for score in self._own:
            rows.append(
                ("own passes", score.name, f"{score.passes}: {self._cost[score.name]:,} tokens")
            )
        return rows

    def _tokens(self) -> list[tuple[int, int]]:
        """(tokens, row length) of every batch, and of the scores that run the model themselves."""
        found = [
            (b.tokens, b.input_ids.shape[1]) for batches in self._batches.values() for b in batches
        ]
        return found + [(self._cost[s.name], min(256, self.settings.context)) for s in self._own]

    @torch.no_grad()
    def _estimate(self) -> tuple[float, float]:
        """Seconds from short timed forwards of two lengths (time = a·L + b·L²), the faster of two,
        as other work on the machine only slows them; gigabytes from shapes."""
        lengths = sorted({64, min(256, self.settings.context)})
        times = []
        for length in lengths:
            row = torch.tensor(rows_of_text(self.model.tokenizer, None, length, 1, 0))
            with self.model.watch(Question(frozenset({"entropy"})), lambda stats: None):
                forward(self.model, row, keep=1)
                times.append(
                    min(timed(partial(forward, self.model, row, keep=1)) for _ in range(2))
                )
        per_token = [t / n for t, n in zip(times, lengths, strict=True)]
        slope = max(0.0, (per_token[-1] - per_token[0]) / max(1, lengths[-1] - lengths[0]))
        base = max(per_token[-1] - slope * lengths[-1], 0.3 * per_token[-1])
        seconds = sum(tokens * (base + slope * length) for tokens, length in self._tokens())
        module = self.model.module
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        element = next(module.parameters()).element_size()
        longest = max(length for _, length in self._tokens())
        heads, d_head, layers = self.model.n_heads, self.model.d_head, self.model.n_layers
        working = (
            longest * heads * d_head * 16 * 4
            + 2 * longest * self.model.n_kv_heads * d_head * layers * element
        )
        return seconds, (size + working) / 1e9

    def run(self, out: Path | None = None, progress: Progress | None = None) -> Atlas:
        """Do the work. With `out`, each finished piece is saved there, and a second run resumes.

        Raises `ActivationError` when a layer's activations are not finite, `OutputError` when `out`
        can't be written.
        """
        from interp.atlas import Atlas

        started = time.time()
        record = provenance(self.model, self.settings.seed, self._settings(), self._inputs())
        pieces = Partial(
            out,
            {k: record[k] for k in ("model", "weights_hash", "inputs_hash", "settings", "seed")},
        )
        jobs = list(self._jobs())
        total, done = sum(j.tokens for j in jobs), 0
        with torch.no_grad():
            for job in jobs:
                if progress:
                    progress(done, total, job.label)
                if not pieces.has(job.key):
                    records: list[Record] = []
                    for i, some in enumerate(job.run()):
                        records += some
                        if progress and job.key.startswith("own"):
                            steps = job_steps(self, job)
                            progress(done + job.tokens * (i + 1) // steps, total, job.label)
                    pieces.save(job.key, records)
                done += job.tokens
        if progress:
            progress(total, total, "done")
        frames = pieces.records([j.key for j in jobs])
        frame = self._frame(frames)
        record["seconds"] = round(time.time() - started, 2)
        atlas = Atlas(frame, record, self._notes(frames))
        atlas.overlays = self._overlays(atlas)
        if out is not None:
            atlas.save(out)
            pieces.clear()
        return atlas

    def _overlays(self, atlas: Atlas) -> list[Overlay]:
        """The first picture, under the heads that look at pictures most."""
        score = next((s for s in ("vhd", "image_mass") if s in atlas.scores), None)
        if score is None or "image" not in self._by_probe:
            return []
        from interp.vision.overlay import of_scan

        prompt, picture = pictures.shown(self.settings)
        return of_scan(self.model, prompt, picture, atlas.top(score, 7, self.model.main_tower))

    def _settings(self) -> dict[str, Any]:
        kept = {
            k: v
            for k, v in asdict(self.settings).items()
            if k not in ("seed", "text") and v is not None
        }
        return dict(
            kept,
            scores=[s.name for s in self.scores],
            text=self.settings.text is not None,
            extrapolate=self.extrapolate and self.settings.context > (self.model.max_context or 0),
            backend=self.model.backend,
        )

    def _inputs(self) -> list[torch.Tensor]:
        batches = [b for batches in self._batches.values() for b in batches]
        found = [
            t
            for b in batches
            for t in (b.input_ids, *b.extra.values())
            if isinstance(t, torch.Tensor)
        ]
        if any(s.needs_images for s in self._own):
            found += [
                t for given in pictures.prompts(self.model, self.settings) for t in given.values()
            ]
        return found

    def _jobs(self) -> Iterator[Job]:
        for name in self._by_probe:
            for i, batch in enumerate(self._batches[name]):
                first = sum(b.samples for b in self._batches[name][:i])
                yield Job(
                    f"{name}-{i:04d}",
                    PROBES[name].what,
                    batch.tokens,
                    partial(self._one, name, batch, first),
                )
        for score in self._own:
            job = partial(self._compute, score)
            yield Job(f"own-{score.name}", score.title.lower(), self._cost[score.name], job)

    def _one(self, name: str, batch: ProbeBatch, first: int) -> Iterator[list[Record]]:
        yield self._probe(name, self._by_probe[name], batch, first)

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
        if not any(s.needs_images for s in scores):
            return by_tower[""]
        names = frozenset(n for q in by_tower.values() for n in q.names)
        calls = any(q.call for q in by_tower.values())
        silent = Question()
        return SiteQuestion(
            names=names,
            call=calls,
            choose=lambda site: by_tower.get("vision" if site.tower == "vision" else "", silent),
        )

    def _probe(
        self, name: str, scores: Sequence[Score], batch: ProbeBatch, first: int
    ) -> list[Record]:
        """Run one batch and turn each layer's statistics into records."""
        records: list[Record] = []
        steps: dict[Site, list[LayerStats]] = {}
        late = [s for s in scores if isinstance(s, PassScore)]
        whole: dict[str, list[LayerStats]] = {s.name: [] for s in late}

        def tell(stats: LayerStats) -> None:
            if stats.site.kind != "self":
                return
            if name == "needle":
                steps.setdefault(stats.site, []).append(stats)
                return
            for score in scores:
                if not score.at(stats.site.tower):
                    continue
                if isinstance(score, PassScore):
                    whole[score.name].append(stats)
                else:
                    records.extend(_records(score, stats.site, score.measure(stats, batch), first))
            stats.call = None  # not kept until the forward's end

        PROBES[name].run(self.model, batch, self._question(scores, batch), tell)
        for site, seen in steps.items():
            for score in scores:
                assert isinstance(score, DecodeScore)
                records.extend(_records(score, site, score.measure_steps(seen, batch), first))
        for score in late:
            layers = whole[score.name]
            for stats, values in zip(layers, score.measure_pass(layers, batch), strict=True):
                records.extend(_records(score, stats.site, values, first))
        if "solved" in batch.info:
            value = float(batch.info["solved"])
            records.append(Record("_solved", first, "", "self", -1, -1, value))
        return records

    def _frame(self, records: Any) -> Any:
        """One row a head; means over samples (NaN left out) and standard errors."""
        from interp.atlas import rows_of

        index = ["tower", "kind", "layer", "head"]
        frame = rows_of(s for s in self.model.sites if s.kind == "self")
        for score in self.scores:
            mine = records[records.score == score.name]
            values = mine.groupby(index, sort=False)["value"]
            summary = values.mean().rename(score.name).to_frame()
            summary[f"{score.name}_stderr"] = values.sem()
            frame = frame.merge(summary.reset_index(), on=index, how="left")
        return frame

    def _notes(self, records: Any) -> list[str]:
        notes = list(self.notes)
        solved = records[records.score == "_solved"]["value"]
        if len(solved):
            accuracy = float(solved.mean())
            if accuracy == 0:
                notes.append(
                    "retrieval: task not solved (needle accuracy 0.00), so retrieval heads can't "
                    "be told."
                )
            else:
                notes.append(
                    f"retrieval: measured on the {int(solved.sum())} of {len(solved)} needle "
                    "problems solved."
                )
        for score in self._by_probe.get("image", ()):
            if score.undefined and not records[records.score == score.name]["value"].notna().any():
                notes.append(f"{score.name}: not measured, for {score.undefined}.")
        if self._settings()["extrapolate"]:
            notes.append(
                f"context {self.settings.context} is beyond the model's {self.model.max_context} "
                "positions."
            )
        return notes


def _unknown_words(tokenizer: Any, batches: Sequence[ProbeBatch]) -> list[str]:
    """A note where most of the text is unknown to the tokenizer."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not batches:
        return []
    share = float(torch.cat([b.input_ids.flatten() == unknown for b in batches]).float().mean())
    if share <= 0.5:
        return []
    return [
        f"{share:.0%} of the text is unknown to this tokenizer, so scores on running text say "
        "little; give --text."
    ]


def job_steps(plan: Plan, job: Job) -> int:
    """How many results an own-passes job yields, for progress within it."""
    score = next(s for s in plan._own if job.key == f"own-{s.name}")
    return max(1, score.steps(plan.model, plan.settings))


def _records(score: Score, site: Site, values: torch.Tensor, first: int) -> list[Record]:
    """(samples, heads) values as records. Infinity is an error; NaN means "not defined in this
    sample"."""
    if bool(torch.isinf(values).any()):
        raise ActivationError(
            f"The score {score.name} of layer {site.layer} is infinite; its activations look "
            "broken."
        )
    return [
        Record(score.name, first + i, site.tower, site.kind, site.layer, h, value)
        for i, row in enumerate(values.float().cpu().tolist())
        for h, value in enumerate(row)
    ]


def plan_scan(
    model: Any,
    scores: str | list[str] = "default",
    context: int | None = None,
    samples: int = 16,
    seed: int = 0,
    text: str | Path | None = None,
    extrapolate: bool = False,
    images: str | Path | None = None,
    prompt: str | None = None,
) -> Plan:
    """The plan of a scan, before running it: `plan.rows`, `plan.seconds`, `plan.run()`.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        scores: "default", "all", or names.
        context: tokens of the text rows and the longest needle prompt; by default 1024, or the
            model's limit if that is lower.
        samples: rows or problems a probe.
        text: a text file to read instead of the generated prose.
        extrapolate: allow a context beyond the model's positions.
        images: a folder of pictures for the image scores, instead of rendered scenes; the first
            `samples` by name.
        prompt: what is asked about each picture; by default "describe the picture :".

    Raises:
        UnknownNameError, ContextError, InputError.
    """
    from interp.loading import load

    chosen = select(scores)  # names are checked before a model is loaded
    if not chosen:
        raise InputError(
            "No score was named; use default, all, or names from `interp.scores.names()`."
        )
    content = read_text(text) if text is not None else None
    if images is not None:
        pictures.files_in(images)
    hooked = load(model)
    chosen = fitting(hooked, chosen, named=scores not in ("default", "all"))
    if images is not None or prompt is not None:
        needs_images(hooked, "images=" if images is not None else "prompt=")
    if hooked.tokenizer is None:
        raise InputError(
            f"{hooked.name} came without a tokenizer; pass interp.load(model, tokenizer=...)."
        )
    if context is None:
        context = min(DEFAULT_CONTEXT, hooked.max_context or DEFAULT_CONTEXT)
    folder = None if images is None else str(images)
    return Plan(
        hooked, chosen, Settings(context, samples, seed, content, folder, prompt), extrapolate
    )


def fitting(model: HookedModel, scores: Sequence[Score], named: bool) -> list[Score]:
    """The scores that the model can have. Raises `InputError` for one that was `named` and needs
    images."""
    for score in scores:
        if named and score.needs_images:
            needs_images(model, f"The score {score.name}")
    return [s for s in scores if not s.needs_images or takes_images(model)]


def scan_heads(
    model: Any,
    scores: str | list[str] = "default",
    context: int | None = None,
    samples: int = 16,
    seed: int = 0,
    text: str | Path | None = None,
    extrapolate: bool = False,
    images: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    progress: Progress | bool | None = True,
) -> Atlas:
    """Score every head. Arguments as in `plan_scan`; `out`: folder to save to (and resume from).

    `progress`: True shows a bar with time left, False nothing, or a function (done, total, label).
    """
    from interp.support.progress import bar

    plan = plan_scan(model, scores, context, samples, seed, text, extrapolate, images, prompt)
    folder = Path(out) if out is not None else None
    if callable(progress):
        return plan.run(folder, progress)
    with bar("scan", enabled=bool(progress)) as tell:
        return plan.run(folder, tell)
