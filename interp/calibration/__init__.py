"""Finding good settings of edits: ``interp.calibrate(model, method="act", task="classification",
out="act.json")``.

Settings are chosen on a training split and reported on a held-out one that the choice never saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.calibration.base import Method
from interp.errors import InputError
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.calibration.bench import Progress
    from interp.calibration.result import Calibration
    from interp.tasks.base import Task

__all__ = ["Method", "calibrate", "names", "registry"]

registry: Registry[type[Method]] = Registry(
    "calibration method",
    "interp.calibration",
    {
        "act": "interp.calibration.act:HeadFilter",
        "zerotuning": "interp.calibration.zerotuning:HeadProfile",
        "headhunter": "interp.calibration.headhunter:HeadHunter",
        "gates": "interp.calibration.gates:GateTraining",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def names() -> list[str]:
    """Names of all calibration methods."""
    return registry.names()


def calibrate(
    model: Any,
    method: str | Method = "act",
    task: str | Task | None = None,
    n: int = 64,
    seed: int = 0,
    heldout: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """Choose an edit's settings on `n` training instances of a task and measure them on held-out
    ones.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        method: "act", "zerotuning", "headhunter", "gates" (their settings as `settings`), or a
            `Method`.
        task: a name, or a task with settings of its own; the method's usual task if None.
        heldout: how many held-out instances; as many as `n` if None. They share no instance with
            the training split.
        out: write the edits to this JSON file, trials and record beside it; an interrupted run
            resumes from there.

    Raises:
        UnknownNameError: no such method or task. InputError: settings that the method does not
            take, too few
        instances, a calibration set with one class. ContextError, EditError, HeadError,
        OutputError.
    """
    from interp.calibration.run import run

    return run(
        model,
        make(method, settings),
        task,
        n,
        seed,
        heldout,
        None if out is None else Path(out),
        progress,
    )


def make(method: str | Method, settings: dict[str, Any]) -> Method:
    """A method with its settings. Raises `UnknownNameError`, `InputError`."""
    if isinstance(method, Method):
        if settings:
            raise InputError(
                f"The method {method.name} has its settings already; {next(iter(settings))} is one "
                "more."
            )
        return method
    kind = registry.get(method)
    unknown = [name for name in settings if name not in kind.settings()]
    if unknown:
        known = ", ".join(kind.settings())
        raise InputError(
            f"The calibration method {method} has no setting {unknown[0]!r}; it has {known}."
        )
    return kind(**settings)
