"""Runs as other processes do them: what they are told, and what they do of it, piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from interp.circuits.finding import Posed
    from interp.circuits.methods.head_ablation import HeadAblation
    from interp.circuits.runs.prompts import Prompts
    from interp.probes.settings import Settings
    from interp.scores.score import Score
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel


class Opened(Protocol):
    """A run on a loaded model, of which any piece can be done."""

    def record(self) -> dict[str, Any]:
        """Where its results come from; its "fingerprint" tells it from any other run."""

    def do(self, key: str) -> Any:
        """What the piece of that key gives."""


class Work(ABC):
    """A run as it is told to a worker: values alone, no model."""

    @abstractmethod
    def open(self, model: HookedModel) -> Opened:
        """The same run on the worker's model."""


@dataclass(frozen=True)
class ScanWork(Work):
    """A scan whose plan is made: the format of its prompts is fixed in the settings."""

    scores: Sequence[Score]
    settings: Settings
    extrapolate: bool

    def open(self, model: HookedModel) -> Opened:
        from interp.scan.work import Scan

        return Scan(model, self.scores, self.settings, self.extrapolate, timed=False)


@dataclass(frozen=True)
class AblationWork(Work):
    """A circuit search that replaces one head after another; a piece is a head."""

    prompts: Prompts
    method: HeadAblation
    seed: int

    def open(self, model: HookedModel) -> Opened:
        from interp.circuits.finding import pose

        return _Ablations(pose(model, self.prompts, self.method, len(self.prompts), self.seed))


class _Ablations:
    """A search at work: what all heads share is run when the first is replaced."""

    def __init__(self, search: Posed):
        from interp.circuits.runs.paired_runs import PairedRuns

        self._search = search
        self._runs = PairedRuns(search.model, search.prompts, search.record["seed"])
        self._sets = keys_of(self._runs.heads, search.method.record()["mode"])
        self._run: Any = None

    def record(self) -> dict[str, Any]:
        return self._search.record

    def do(self, key: str) -> Any:
        if self._run is None:
            mode = self._search.method.record()["mode"]
            self._run = self._runs.ablation(mode, self._runs.many(len(self._sets)))
        with self._search.model.clean():
            return self._run([self._sets[key]])


def keys_of(heads: Sequence[Head], mode: str) -> dict[str, Head]:
    """The piece of each head that is replaced alone."""
    from interp.circuits.runs.paired_runs import set_key

    return {set_key(mode, [head]): head for head in heads}
