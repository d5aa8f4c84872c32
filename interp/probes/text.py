"""Probes of text: running prose, repeated tokens, prose against code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interp.inputs.text import code_rows, rows_of_text
from interp.probes.probe import Probe, ProbeBatch
from interp.probes.settings import Settings
from interp.tasks.catalogue import get as task


class TextProbe(Probe):
    """Running text of `context` tokens, one row a sample."""

    name, what = "text", "running text"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        return [ProbeBatch(torch.tensor([r])) for r in settings.rows(tokenizer)]

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        """A note where most of the text is unknown to the tokenizer."""
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown is None or not batches:
            return []
        share = torch.cat([b.input_ids.flatten() == unknown for b in batches]).float().mean()
        if share <= 0.5:
            return []
        return [
            f"{float(share):.0%} of the text is unknown to this tokenizer, so scores on running "
            "text say little; give --text."
        ]


class RepeatProbe(Probe):
    """Random tokens, twice, all samples in one batch; `info`: start (first random token), repeat
    (length)."""

    name, what = "repeat", "repeated random tokens"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        instances = task("induction").sample(tokenizer, settings.samples, settings.seed)
        ids = torch.tensor([[*i.ids] for i in instances])
        return [ProbeBatch(ids, None, dict(instances[0].info), len(instances))]


class DomainsProbe(Probe):
    """Prose and code side by side: rows 2i and 2i+1 are sample i in the first and the second
    domain."""

    name, what = "domains", "prose against code, 256 tokens"
    length = 256

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        length = min(self.length, settings.context)
        prose = rows_of_text(tokenizer, None, length, settings.samples, settings.seed)
        code = code_rows(tokenizer, length, settings.samples, settings.seed)
        return [ProbeBatch(torch.tensor([*pair])) for pair in zip(prose, code, strict=True)]
