"""What a scan will do: which scores on which inputs, in how many passes, seconds and gigabytes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.atlas import REPORT_SECONDS
from interp.errors import ContextError, InputError, TapError
from interp.inputs.chunks import check_chunks
from interp.inputs.context import check_context
from interp.inputs.pace import LONG, Pace, PicturePace
from interp.inputs.text import named
from interp.probes import catalogue as probes
from interp.probes.image import image_batch
from interp.probes.needle import settled
from interp.probes.probe import ProbeBatch
from interp.probes.settings import Settings
from interp.scan import evidence, pictures_alone
from interp.scan.massive import CONTEXT
from interp.scores.score import ModelScore, Score
from interp.support.html import block
from interp.support.progress import duration
from interp.vision.pixels import assumed
from interp.vision.prompts import needs_images, takes_images
from interp.vision.towers import picture_tower, sees_alone
from interp.vision.words import CAPTION, PICTURES
from interp_hooks.question import ROW

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: seconds that saving takes for a score
SAVING = 0.05


class Plan:
    """What a scan will do. `rows`: (probe, what it measures, passes); `seconds`, `gigabytes`:
    estimates, not made where it is not `timed`."""

    def __init__(
        self,
        model: HookedModel,
        scores: Sequence[Score],
        settings: Settings,
        extrapolate: bool = False,
        timed: bool = True,
    ):
        self._pictures_alone, self._picture_tower = sees_alone(model), picture_tower(model)
        if not self._pictures_alone:
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
        if self._pictures_alone and (said := assumed(model)):
            self.notes.append(said)
        if any(probes.get(s.probe).posed for s in scores if not isinstance(s, ModelScore)):
            self._settle()
            settings = self.settings
        self._by_probe: dict[str, list[Score]] = {}
        for score in scores:
            if not isinstance(score, ModelScore):
                self._by_probe.setdefault(score.probe, []).append(score)
        self._batches: dict[str, list[ProbeBatch]] = {}
        for name in list(self._by_probe):
            try:
                self._batches[name] = probes.get(name).make(model, settings)
            except (InputError, ContextError) as reason:
                # this model can't be posed that problem: other scores stand
                if isinstance(reason, ContextError) and not probes.get(name).optional:
                    raise
                if len(self._by_probe) == 1 and len(scores) == len(self._by_probe[name]):
                    raise
                self.notes += [
                    f"{s.name}: not measured. {reason}" for s in self._by_probe.pop(name)
                ]
        self._set_chunks()
        self._own: list[ModelScore] = []
        self._cost: dict[str, int] = {}
        for own in (s for s in scores if isinstance(s, ModelScore)):
            try:
                self._cost[own.name] = own.cost(model, settings)
                self._own.append(own)
            except (InputError, ContextError, TapError) as reason:
                spared = own.needs_images or own.optional or isinstance(reason, TapError)
                if len(scores) == 1 or not spared:
                    raise
                self.notes.append(f"{own.name}: not measured. {reason}")
        self.rows = self._describe()
        self._seconds: dict[str, float] = {}
        self._finish: dict[str, float] = {}
        self.seconds, self.gigabytes = self._estimate() if timed else (0.0, 0.0)

    def _set_chunks(self) -> None:
        """Texts are read in chunks, where that was asked for and is proved to say the same."""
        chunk = self.settings.chunk
        if chunk is None:
            return
        texts = [
            batch
            for batches in self._batches.values()
            for batch in batches
            if not batch.extra and batch.input_ids.shape[1]
        ]
        if not texts:
            raise InputError(
                "Nothing of this scan is a text, so there is nothing to read in chunks."
            )
        row = texts[0].input_ids[:1]
        check_chunks(self.model, chunk, row, max(batch.length for batch in texts))
        for batch in texts:
            batch.chunk = chunk

    def _settle(self) -> None:
        """Fix the format of needle prompts; what is in the way is told when they are made."""
        try:
            self.settings, note = settled(self.model, self.settings)
        except (InputError, ContextError):
            return
        self.notes += [note] if note else []

    def _describe(self) -> list[tuple[str, str, str]]:
        rows = []
        for name, scores in self._by_probe.items():
            probe = probes.get(name)
            names = ", ".join(s.name for s in scores)
            rows.append((probe.what, names, probe.passes(self._batches[name])))
        for score in self._own:
            passes = f"{score.passes}: {self._cost[score.name]:,} tokens"
            rows.append(("own passes", score.name, passes))
        return rows

    @property
    def cost(self) -> str:
        """ "About 40 s and 610 MB of memory"."""
        size = (
            f"{self.gigabytes:.1f} GB"
            if self.gigabytes >= 0.1
            else f"{max(1, round(self.gigabytes * 1000))} MB"
        )
        return f"About {duration(self.seconds)} and {size} of memory"

    def __repr__(self) -> str:
        cost = self.cost[:1].lower() + self.cost[1:]
        return f"Plan({self.model.name}: {len(self.scores)} scores, {cost})"

    def _repr_html_(self) -> str:
        headings = ("probe", "measured", "tokens × samples")
        return block(f"Plan for {self.model.name}", self.cost, {}, headings, self.rows, self.notes)

    @property
    def _lists_massive(self) -> bool:
        return any(s.lists_massive for s in self._own)

    @property
    def _gathers_evidence(self) -> bool:
        """Whether passages are looked for: where the model reads text."""
        there = self.model.tokenizer is not None or self.settings.inputs is not None
        return there and not self._pictures_alone

    def _longest(self) -> int:
        """The longest row that is run."""
        lengths = [b.length for batches in self._batches.values() for b in batches]
        own = [min(s.length or 256, self.settings.context) for s in self._own]
        return max([*lengths, *own])

    def _pace(self) -> Pace:
        """Timed runs on a text, on a user's own tokens, or on a picture alone."""
        if self._pictures_alone:
            (one,) = self.settings.pictures.inputs(self.model, limit=1)
            batch = image_batch(self.model, one)
            return PicturePace(self.model, batch.extra, batch.length)
        length = min(LONG, self.settings.context)
        rows = replace(self.settings, text=None, samples=1).rows(self.model.tokenizer, length)
        ids = torch.tensor(rows[0])
        asked = [
            score.ask(self._batches[probe][0]).names
            for probe, scores in self._by_probe.items()
            for score in scores
        ]
        return Pace(self.model, ids, frozenset().union(*asked) & set(ROW) - {"group_mass"})

    @torch.no_grad()
    def _estimate(self) -> tuple[float, float]:
        """Seconds of everything that `run` does, from short timed runs; gigabytes from shapes."""
        pace, settings = self._pace(), self.settings
        self._seconds = {
            f"{name}-{i:04d}": probes.get(name).seconds(batch, pace)
            for name, batches in self._batches.items()
            for i, batch in enumerate(batches)
        } | {f"own-{s.name}": s.seconds(self.model, settings, pace) for s in self._own}
        self._finish = {
            "overlays": 0.0,
            "massive": 0.0,
            "evidence": 0.0,
            "saving": SAVING * (1 + len(self.scores)),
        }
        if self._lists_massive:
            length = min(CONTEXT, settings.context)
            self._finish["massive"] = pace.plain(settings.samples, length)
        if self._gathers_evidence:
            self._finish["evidence"] = evidence.seconds(self.model, settings, pace)
        if any(s.drawn for s in self.scores) and takes_images(self.model):
            shown = pace.watched(1, self._longest())
            if settings.words is not None:  # with a caption of each picture
                count = min(PICTURES, settings.pictures.count())
                shown = count * (shown + CAPTION * pace.step())
            self._finish["overlays"] = shown
        seconds = sum(self._seconds.values()) + sum(self._finish.values()) + REPORT_SECONDS
        module = self.model.module
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        element = next(module.parameters()).element_size()
        longest = self._longest()
        heads, d_head, layers = self.model.n_heads, self.model.d_head, self.model.n_layers
        working = (
            longest * heads * d_head * 16 * 4
            + 2 * longest * self.model.n_kv_heads * d_head * layers * element
        )
        return seconds, (size + working) / 1e9

    def _settings(self) -> dict[str, Any]:
        values = {
            k: named(v) if k == "haystack" and v is not None else v
            for k, v in asdict(self.settings).items()
            if k not in ("seed", "text", "inputs")
            and not (k == "context" and self._pictures_alone)
            and v is not None
            and v is not False
            and v != "auto"
        }
        return dict(
            values,
            scores=[s.name for s in self.scores],
            text=self.settings.text is not None,
            **({} if self.settings.inputs is None else dict(inputs="own")),
            extrapolate=self.extrapolate and self.settings.context > (self.model.max_context or 0),
            backend=self.model.backend,
        )

    def _inputs(self) -> list[torch.Tensor]:
        batches = [b for batches in self._batches.values() for b in batches]
        tensors = [
            t
            for b in batches
            for t in (b.input_ids, *b.extra.values())
            if isinstance(t, torch.Tensor)
        ]
        for score in self._own:
            tensors += score.inputs(self.model, self.settings)
        return tensors


def fitting(
    model: HookedModel,
    scores: Sequence[Score],
    named: Container[str],
    folder: str | Path | None = None,
) -> list[Score]:
    """The scores that the model can have. Raises `InputError` for one that was `named` and needs
    images, text that the model does not read, or scenes where the pictures are a folder's."""
    if sees_alone(model):
        return pictures_alone.of_tower(model, scores, named)
    for score in scores:
        if score.name in named and score.needs_images:
            needs_images(model, f"The score {score.name}")

        if score.name in named and score.needs_scenes and folder is not None:
            raise InputError(
                f"The score {score.name} needs to know where things lie, which it does in rendered "
                f"scenes, not in the pictures of {folder}; leave images= (--images) out, or the "
                "score."
            )

    def has(score: Score) -> bool:
        if score.needs_scenes and folder is not None:
            return False
        there = score.name in named or not score.needs_site
        return there or any(getattr(site, score.needs_site) for site in model.sites)

    return [s for s in scores if has(s) and (not s.needs_images or takes_images(model))]
