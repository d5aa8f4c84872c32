"""Every error a user can cause: one sentence that says what was wrong and what to do.

The command line prints that sentence and exits with 2; in Python the class says what kind it is.
"""

from __future__ import annotations

from interp_hooks.errors import (
    ActivationError,
    ContextError,
    EditError,
    HeadError,
    InputError,
    InterpError,
    TapError,
)

__all__ = [
    "ActivationError",
    "ContextError",
    "EditError",
    "FloorError",
    "HeadError",
    "InputError",
    "InterpError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "TapError",
    "UnknownNameError",
    "WorkerError",
]


class UnknownNameError(InterpError, KeyError):
    """A score, task, edit or model name that is not registered."""

    def __str__(self) -> str:  # KeyError would print the repr
        return " ".join(str(self.args[0]).split("\n")) if self.args else ""


class ModelError(InterpError):
    """A model that cannot be found, read or loaded."""


class FloorError(InputError):
    """A model that can't do the task that a result was to be drawn from."""


class MissingExtraError(InterpError, ImportError):
    """A package of an optional extra that is not installed."""


class OutputError(InterpError):
    """A place that cannot be written to, or a saved result that cannot be read."""


class WorkerError(InterpError):
    """Workers that can't be had, died again and again, or would measure something else."""
