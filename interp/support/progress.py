"""One progress bar with time left, for notebooks, scripts and the command line; and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: report(done, total, what)
Progress = Callable[[int, int, str], None]


@contextmanager
def bar(title: str, enabled: bool = True) -> Iterator[Progress | None]:
    """Yields report(done, total, what), or None when not enabled."""
    if not enabled:
        yield None
        return
    with progress(title) as report:
        yield report


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """One progress bar with the time left, on stderr; a line every tenth where stderr is not a
    terminal.

    Yields ``report(done, total, what)``.
    """
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
    done."""

    def __init__(self, console: Console, title: str):
        self._console, self._title, self._tenth = console, title, -1

    def __call__(self, done: int, total: int, what: str) -> None:
        from rich.text import Text

        tenth = 10 * done // total if total else 0
        if tenth > self._tenth:
            self._tenth = tenth
            self._console.print(
                Text(f"{self._title}: {done / max(total, 1):4.0%} {what}".rstrip()), soft_wrap=True
            )


def _clip(text: str, width: int = 36) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
