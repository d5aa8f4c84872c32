"""Runs as other processes do them: what they are told, and what they do of it, piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from interp.probes.settings import Settings
    from interp.scores.score import Score
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
        from interp.scan.run import Scan

        return Scan(model, self.scores, self.settings, self.extrapolate, timed=False)
