"""What a calibration method is: it looks at a bench of training instances and answers with
edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import InputError
from interp.support.settings import SettingsRecord
from interp_hooks.heads import Head, layer_list

if TYPE_CHECKING:
    import pandas as pd

    from interp.calibration.splits import Bench
    from interp.tasks.task import Instance
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Found:
    """What a method found: `edits`; `trials`, one row a trial; `trace`, one row a training step,
    for learned settings; `notes`, sentences to tell the user."""

    edits: list[Edit]
    trials: pd.DataFrame
    trace: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)


class Method(SettingsRecord, ABC):
    """A method that chooses the settings of an edit: the base class.

    Subclasses are frozen dataclasses; their fields are the settings.

    Example:
        >>> interp.calibration.registry.get("zerotuning").usual_task
        'classification'
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    #: settings under a name: {"paper": {"guard": "none"}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: the task used where none is named
    usual_task: ClassVar[str] = "classification"
    #: whether right answers are looked at; then a calibration set with one class is refused
    needs_labels: bool = True

    def check(self, model: HookedModel, train: Sequence[Instance]) -> None:
        """Raise `InputError`, before anything runs, where the settings don't fit the model or these
        instances."""
        heads_of(model, getattr(self, "layers", None))

    @abstractmethod
    def find(self, bench: Bench) -> Found:
        """Choose settings from the bench's training instances alone."""


def heads_of(model: HookedModel, layers: Iterable[int] | None) -> list[Head]:
    """The heads of the main tower, in these layers; None for all. Raises `InputError` for a layer
    that is not there."""
    main = "" if "" in model.towers else "text" if "text" in model.towers else model.towers[0]
    heads = [h for h in model.heads if h.tower == main]
    if layers is None:
        return heads
    numbers = sorted(set(layers))
    there = {h.layer for h in heads}
    missing = [layer for layer in numbers if layer not in there]
    if missing or not numbers:
        named = f"layer {missing[0]}" if missing else "no layers"
        raise InputError(
            f"A calibration was asked for {named}; {model.name} has attention in "
            f"{layer_list(there)}."
        )
    return [h for h in heads if h.layer in numbers]
