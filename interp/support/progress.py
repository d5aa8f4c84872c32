"""One progress bar with time left, for notebooks, scripts and the command line; and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(title: str, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yields report(done, total, what), or None when not enabled."""
    if not enabled:
        yield None
        return
    from interp.cli.common import progress

    with progress(title) as report:
        yield report


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
