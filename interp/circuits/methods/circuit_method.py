"""What a circuit method is: it looks at a model on pairs of prompts and gives every head a
number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import InputError
from interp.support.presets import settings_of
from interp.support.settings import SettingsRecord

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from interp.circuits.runs.paired_runs import PairedRuns


@dataclass(frozen=True)
class Found:
    """What a method found, in the order of `runs.heads`.

    score: (heads,) ≥ 0, how surely or strongly a head is part of the circuit; effect: (heads,)
    signed, what the head does for the metric, where the method tells; effects: (heads, n) the same
    on each prompt, from which the effect's standard error and 95 % interval are made, signed, so
    that they may hold 0; stderr, low, high: (heads,) of a score that is sampled otherwise (95 %);
    edges: sender, receiver, kind, score, a row an edge; notes: sentences to tell the user;
    artefacts: name → something with `save(folder)` to be kept beside it.
    """

    score: np.ndarray
    effect: np.ndarray | None = None
    stderr: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    effects: np.ndarray | None = None
    edges: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    artefacts: dict[str, Any] = field(default_factory=dict)


class Method(SettingsRecord, ABC):
    """A method that finds circuits: the base class.

    Subclasses are frozen dataclasses; their fields are the settings.

    Example:
        >>> interp.circuits.registry.get("eap_ig")
        <class 'interp.circuits.methods.eap_ig.EAPIG'>
    """

    name: ClassVar[str]
    title: ClassVar[str]
    #: one line for the command line's help
    summary: ClassVar[str]
    #: how the score is read, one sentence
    reading: ClassVar[str]
    #: how the signed effect is read, where there is one
    effect_reading: ClassVar[str] = (
        "What the metric loses without the head: above 0 it works for the right answer, below 0 "
        "against it."
    )
    formula: ClassVar[str]
    citation: ClassVar[str]
    #: of score and effect; "metric" for that of the task's metric
    unit: ClassVar[str] = ""
    #: what the rows of its edges are: edges of the model's "graph" (`runs.edges.Graph`), which can
    #: be judged and kept or cut; "pairs" of heads; or "paths" into chosen receivers
    edges_of: ClassVar[str] = "graph"
    #: settings under a name: {"paper": {"features": 200}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def caption(self) -> str:
        """How the score is read with these settings."""
        return self.reading

    def shuffles(self) -> tuple[str, ...]:
        """What is shuffled in the prompts as this method's control: some of "labels", "pairs" and
        "sides" (`interp.circuits.benching.shuffling`). Shuffled pairs change nothing where a head
        is replaced by a mean or by 0."""
        twinless = getattr(self, "mode", "") in ("mean", "zero", "optimal")
        return ("labels",) if twinless else ("labels", "pairs")

    def twin(self) -> Method | None:
        """The method with something of its own shuffled, where it has such a control."""
        return None

    @abstractmethod
    def find(self, runs: PairedRuns) -> Found:
        """Score the heads of the runs' model on its prompts."""

    @classmethod
    def make(cls, preset: str | None = None, **settings: Any) -> Method:
        """The method with a preset's settings and these on top. Raises `InputError` for names that
        it doesn't have."""
        values = settings_of(f"method {cls.name}", preset, cls.presets)
        for name in settings:
            if name not in cls.settings():
                names = ", ".join(cls.settings()) or "none"
                raise InputError(
                    f"{name} is not a setting of the method {cls.name}; it takes {names}."
                )
        return cls(**{**values, **settings})

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `InputError` for settings that make no sense."""

    def choice(self, name: str, *allowed: str) -> None:
        """Raise `InputError` unless the setting `name` is one of these."""
        value = getattr(self, name)
        if value not in allowed:
            raise InputError(
                f"{name} of {self.name} is one of {', '.join(allowed)}, not {value!r}."
            )

    def at_least(self, least: int, *names: str) -> None:
        """Raise `InputError` unless these settings are whole numbers from `least` on."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(
                    f"{name} of {self.name} is a whole number from {least} on, not {value!r}."
                )
