"""Progress in a Jupyter kernel: a widget where ipywidgets is installed, else an HTML bar that is
drawn again in its place. Neither package is a dependency: IPython is there where a kernel is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from html import escape
from importlib import import_module
from importlib.util import find_spec
from typing import Any

#: seconds between two drawings: a front end that is told of every step lags behind
PAUSE = 0.1
#: imported where it is installed, and never needed
WIDGETS = "ipywidgets"


def display_module() -> Any:
    """`IPython.display`, where this runs in a Jupyter kernel; None in a script or a terminal."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    get = getattr(ipython, "get_ipython", None)
    shell = get() if callable(get) else None
    if getattr(shell, "kernel", None) is None:  # IPython in a terminal has none
        return None
    return sys.modules.get("IPython.display") or getattr(ipython, "display", None)


class NotebookBar:
    """A progress bar in a notebook's output: ``bar(done, total, what)``, then `close`.

    Args:
        title: what is under way.
        display: `IPython.display`.
        now: a clock in seconds.
    """

    def __init__(self, title: str, display: Any, now: Callable[[], float] = time.monotonic):
        self._title, self._display, self._now = title, display, now
        self._begun = now()
        self._drawn = -PAUSE
        self._widget = _widget() if find_spec(WIDGETS) is not None else None
        self._handle: Any = None
        if self._widget is not None:
            display.display(self._widget[0])
        else:
            self._handle = display.display(display.HTML(self._html(0.0, title)), display_id=True)

    def __call__(self, done: int, total: int, what: str) -> None:
        now = self._now()
        if done < total and now - self._begun - self._drawn < PAUSE:
            return
        self._drawn = now - self._begun
        share = min(1.0, done / total) if total else 0.0
        text = f"{self._title}: {what}" if what else self._title
        self._draw(share, f"{text}, {share:.0%}{self._left(share)}")

    def _left(self, share: float) -> str:
        """The time that is left, by the time it took so far; "" before anything is done."""
        if not 0 < share < 1 or self._drawn < 1:
            return ""
        seconds = self._drawn * (1 - share) / share
        minutes = round(seconds / 60)
        return f", {round(seconds)} s left" if seconds < 90 else f", {minutes} min left"

    def _draw(self, share: float, text: str) -> None:
        if self._widget is not None:
            _, bar, label = self._widget
            bar.value, label.value = share, escape(text)
        else:
            self._handle.update(self._display.HTML(self._html(share, text)))

    def close(self) -> None:
        """Takes the bar away; what comes of the work stands in its place."""
        if self._widget is not None:
            self._widget[0].close()
        else:
            self._handle.update(self._display.HTML(""))

    @staticmethod
    def _html(share: float, text: str) -> str:
        bar = f'<progress value="{share:.4f}" max="1" style="vertical-align: middle"></progress>'
        return f"<div>{bar} {escape(text)}</div>"


def _widget() -> tuple[Any, Any, Any]:
    """(what is shown, its bar, its label)."""
    widgets = import_module(WIDGETS)
    bar, label = widgets.FloatProgress(value=0.0, min=0.0, max=1.0), widgets.HTML()
    return widgets.HBox([bar, label]), bar, label
