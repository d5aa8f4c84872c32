"""What a run of the tests begins, and what it tells while it goes on: each failure at once, each
test of a minute and more, and, where the run is ended from outside, what was running."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import pytest

SLOW = 60.0  # seconds


class LongUntil:
    """A long test is not begun after `--long-until`, and the report says so. A plugin, since hooks
    of tests/conftest.py are not asked about the notebooks beside that folder."""

    def __init__(self, until: float | None) -> None:
        self.until = until

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.until is not None and item.get_closest_marker("long") and time.time() > self.until:
            pytest.skip("long, and the time for such tests was over")


class Progress:
    """The plugin, in the process that writes to the terminal (not in a worker)."""

    def __init__(self, config: pytest.Config, end_at: float | None = None) -> None:
        self.config, self.end_at = config, end_at
        self.running: dict[str, float] = {}

    def write(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write(f"\n{line}\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.monotonic() - self.running.pop(nodeid, time.monotonic())
        if seconds >= SLOW:
            self.write(f"{seconds:.0f} s  {nodeid}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(f"FAILED ({report.when})  {report.nodeid}")

    def pytest_sessionstart(self) -> None:
        signal.signal(signal.SIGTERM, self.ended)
        if self.end_at is not None:
            end = threading.Timer(
                max(0.0, self.end_at - time.time()), os.kill, (os.getpid(), signal.SIGTERM)
            )
            end.daemon = True
            end.start()

    def ended(self, number: int, frame: FrameType | None) -> None:
        """Say what runs, then end as Ctrl-C does: with the summary of what failed so far."""
        for nodeid, began in self.running.items():
            self.write(f"running for {time.monotonic() - began:.0f} s  {nodeid}")
        raise KeyboardInterrupt
