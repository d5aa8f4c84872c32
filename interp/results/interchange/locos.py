"""LOCOS' JSON: the scores of each head a trial, with the trials' names."""

from __future__ import annotations

import json
from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import Entries
from interp.results.interchange.file_format import FileFormat
from interp.results.interchange.retrieval_head import lists_of, mean, sample_lists


class Locos(FileFormat):
    """`{"scores": {"16-19": [0.3, …]}, "trial_ids": […], "meta": {…}}`: layer-head → its score in
    each trial that was solved (aryopg/locos, arXiv 2607.01002)."""

    name, what, score = "locos", "LOCOS JSON", "locos"

    def claims(self, content: Any) -> bool:
        return isinstance(content, dict) and isinstance(content.get("scores"), dict)

    def read(self, content: Any) -> Entries:
        samples = sample_lists(content["scores"])
        trials = content.get("trial_ids") or []
        if not isinstance(trials, list):
            raise InputError("trial_ids is a list.")
        lengths = {len(values) for values in samples.values()}
        if trials and lengths != {len(trials)}:
            raise InputError(
                f"It names {len(trials)} trials, and its heads have {min(lengths)} to "
                f"{max(lengths)} scores."
            )
        meta = content.get("meta")
        said = {"trial_ids": trials, "meta": meta if isinstance(meta, dict) else {}}
        means = {place: mean(values) for place, values in samples.items() if values}
        return Entries(self.name, self.score, means, samples, said=said)

    def write(self, entries: Entries) -> str:
        self.refuse_kv_heads(entries)
        lists = lists_of(entries)
        lengths = {len(values) for values in lists.values()}
        trials = entries.said.get("trial_ids") or []
        if lengths != {len(trials)}:
            trials = [str(n) for n in range(lengths.pop())] if len(lengths) == 1 else []
        meta = entries.said.get("meta") or {}
        return json.dumps({"scores": lists, "trial_ids": list(trials), "meta": dict(meta)}) + "\n"
