"""One progress bar with time left, for notebooks, scripts and the command line; and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from interp.errors import InputError
from interp.support.notebook import NotebookBar, display_module
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from rich.console import Console

#: report(done, total, what)
Progress = Callable[[int, int, str], None]
#: what `progress=` takes: True for a bar, False or None for nothing, or a `Progress`
Shown = Any


#: seconds after which a line of a log says what has begun
PATIENCE = 3


@contextmanager
def bar(title: str, enabled: bool = True) -> Iterator[Progress | None]:
    """Yields report(done, total, what), or None when not enabled."""
    if not enabled:
        yield None
        return
    with progress(title) as report:
        yield report


P = ParamSpec("P")
R = TypeVar("R")


def reporting(title: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes the `progress=` of a function take True (a bar), False or None (nothing), or a function
    (done, total, what); the function itself is given a function or None.

    Raises `InputError`, when called, for anything else.
    """

    def made(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = parameters.bind(*args, **kwargs).arguments.get("progress")
            except TypeError:  # Python's own sentence on arguments
                return function(*args, **kwargs)
            if given is None or (callable(given) and not isinstance(given, type)):
                return function(*args, **kwargs)
            if not isinstance(given, bool):
                raise InputError(
                    "progress= takes True, False, or a function (done, total, what), and not "
                    f"{quoted(given)}."
                )
            bound = parameters.bind(*args, **kwargs)
            with bar(title, given) as report:
                bound.arguments["progress"] = report
                return function(*bound.args, **bound.kwargs)

        return run

    return made


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """One progress bar with the time left: a widget in a notebook, else on stderr; a line every
    tenth where stderr is not a terminal.

    Yields ``report(done, total, what)``.
    """
    display = display_module()
    if display is not None:
        shown = NotebookBar(title, display)
        yield shown
        shown.close()  # after an error it stays, where the work stopped
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console, title)
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
    )
    with Bar(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, what: str) -> None:
            bar.update(
                task,
                completed=done,
                total=total,
                description=_clip(f"{title}: {what}" if what else title),
            )

        yield report


class _Lines:
    """Progress for logs and pipes: a line at the first report, then whenever another tenth is
    done, or something else begins after `PATIENCE` seconds without a line."""

    def __init__(self, console: Console, title: str):
        self._console, self._title, self._tenth = console, title, -1
        self._what, self._told = "", time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        from rich.text import Text

        tenth = 10 * done // total if total else 0
        now = time.monotonic()
        other = what != self._what and now - self._told > PATIENCE
        if tenth > self._tenth or other:
            self._tenth, self._what, self._told = max(tenth, self._tenth), what, now
            self._console.print(
                Text(f"{self._title}: {done / max(total, 1):4.0%} {what}".rstrip()), soft_wrap=True
            )


def before(report: Progress, share: float) -> Progress:
    """`report` for the work that stands before the last `share` of the whole."""

    def told(done: int, total: int, what: str) -> None:
        report(done, max(total + 1, round(total / (1 - share))), what)

    return told


class Clock:
    """Progress over pieces of known expected seconds, told in milliseconds: all is done when the
    last piece is, and not before.

    Args:
        report: who is told; None for nobody.
        seconds: what each piece is expected to take, in order.
    """

    def __init__(self, report: Progress | None, seconds: Sequence[float]):
        # a piece counts, however short, so that the bar is not full before it
        self._pieces = [max(1, round(1000 * s)) for s in seconds]
        self._report, self.total = report, sum(self._pieces)
        self._piece, self._label = 0, ""

    def start(self, label: str) -> None:
        """The next piece begins."""
        self._label = label
        self.within(0.0)

    def within(self, share: float) -> None:
        """So much of the piece is done."""
        if self._report is not None:
            part = min(int(self._pieces[self._piece] * share), self._pieces[self._piece] - 1)
            done = sum(self._pieces[: self._piece]) + max(part, 0)
            self._report(done, self.total, self._label)

    def finish(self) -> None:
        """The piece is done."""
        self._piece += 1
        if self._report is not None and self._piece == len(self._pieces):
            self._report(self.total, self.total, "done")


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _clip(text: str, width: int = 36) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
