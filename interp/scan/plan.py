"""What a scan will do: which scores on which inputs, in how many passes, seconds and gigabytes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import ContextError, InputError, TapError
from interp.inputs.context import check_context
from interp.inputs.forward import forward
from interp.probes import catalogue as probes
from interp.probes.needle import settled
from interp.probes.probe import ProbeBatch
from interp.probes.settings import Settings
from interp.scores.score import ModelScore, Score
from interp.support.progress import timed
from interp.vision.prompts import needs_images, takes_images
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


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

    def _tokens(self) -> list[tuple[int, int]]:
        """(tokens, row length) of every batch, and of the scores that run the model themselves."""
        sizes = [
            (b.tokens, b.input_ids.shape[1]) for batches in self._batches.values() for b in batches
        ]
        return sizes + [(self._cost[s.name], min(256, self.settings.context)) for s in self._own]

    @torch.no_grad()
    def _estimate(self) -> tuple[float, float]:
        """Seconds from short timed forwards of two lengths (time = a·L + b·L²), the faster of two,
        as other work on the machine only slows them; gigabytes from shapes."""
        lengths = sorted({64, min(256, self.settings.context)})
        times = []
        for length in lengths:
            rows = replace(self.settings, text=None, samples=1).rows(self.model.tokenizer, length)
            row = torch.tensor(rows[:1])
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

    def _settings(self) -> dict[str, Any]:
        values = {
            k: v
            for k, v in asdict(self.settings).items()
            if k not in ("seed", "text", "inputs")
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


def fitting(model: HookedModel, scores: Sequence[Score], named: Container[str]) -> list[Score]:
    """The scores that the model can have. Raises `InputError` for one that was `named` and needs
    images."""
    for score in scores:
        if score.name in named and score.needs_images:
            needs_images(model, f"The score {score.name}")

    def has(score: Score) -> bool:
        there = score.name in named or not score.needs_site
        return there or any(getattr(site, score.needs_site) for site in model.sites)

    return [s for s in scores if has(s) and (not s.needs_images or takes_images(model))]
