"""What a fuzzed part of the toolkit is to the runner."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from interp.errors import InterpError


class Target:
    """One part that takes inputs from outside.

    `folder` is its own, made anew for each run; a target changes into it.
    """

    name: ClassVar[str]
    #: seconds of processor time after which an input counts as too slow
    limit: ClassVar[float] = 20.0

    def __init__(self, folder: Path):
        self.folder = folder
        self.prepare()

    def prepare(self) -> None:
        """Makes what the inputs are mutations of."""

    def inputs(self) -> st.SearchStrategy[Any]:
        """The inputs."""
        raise NotImplementedError

    def run(self, value: Any) -> str:
        """Runs one input; what came out, in a word. Errors go to `refused`."""
        raise NotImplementedError

    def refused(self, error: BaseException) -> bool:
        """Whether an error is a typed refusal with one sentence, and no traceback to a user."""
        text = str(error)
        return isinstance(error, InterpError) and len(text) > 10 and "\n" not in text.strip()


def raised_by(error: BaseException) -> tuple[str, str]:
    """(file, source line) of the frame that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].line or "") if frames else ("", "")
