"""One worker: it loads a model once, and does the pieces of runs that it is handed."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from interp.workers.work import Opened, Work


class Answer(NamedTuple):
    """What became of a piece: its `result`, or the `error` that a user can do something about; and
    in which process (`who`)."""

    who: str
    result: Any = None
    error: Exception | None = None


class Worker:
    """Does pieces of runs, on a model that it loads when the first is handed to it and keeps.

    Nothing it holds matters: where it dies, another one loads the model and goes on.

    Args:
        threads: of PyTorch.
    """

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._recipe: dict[str, Any] | None = None
        self._model: Any = None
        self._run: tuple[str, Opened] | None = None
        self._who = f"{platform.node()}:{os.getpid()}"

    def do(self, name: str, recipe: dict[str, Any], work: Work, key: str) -> Answer:
        """Do a piece of a run.

        Args:
            name: the run's fingerprint, which the run must have here too.
            recipe: what `interp.load` is given.
            work: the run. key: the piece.
        """
        from interp.errors import InterpError
        from interp.support.memory import free, is_out_of_memory

        try:
            return Answer(self._who, self._opened(name, recipe, work).do(key))
        except InterpError as error:
            return Answer(self._who, error=error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        free()
        return Answer(self._who, error=MemoryError(said))

    def _opened(self, name: str, recipe: dict[str, Any], work: Work) -> Opened:
        """The run on the worker's model. Raises `WorkerError` where it would be another one."""
        import interp
        from interp.errors import WorkerError
        from interp.support.memory import free

        if self._run is not None and self._run[0] == name:
            return self._run[1]
        if self._model is None or self._recipe != recipe:
            self._run = self._model = None
            free()
            self._model, self._recipe = interp.load(**recipe), recipe
        run = work.open(self._model)
        if run.record()["fingerprint"] != name:
            raise WorkerError(
                f"The worker on {platform.node()} would measure something else than this process: "
                "its model, code, versions or kind of device differ, or the model here was changed "
                "after it was loaded; install and load the same in both."
            )
        self._run = name, run
        return run
