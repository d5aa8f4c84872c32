"""One progress bar with time left, for notebooks, scripts and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yields report(done, total, what), or None when not enabled."""
    if not enabled:
        yield None
        return
    from interp.cli.common import progress

    with progress(title) as report:
        yield report
