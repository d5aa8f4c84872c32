"""Every architecture of a kind, each in its own process with a time limit."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from interp_hooks.conformance.building import build
from interp_hooks.conformance.checks import Comparison, Outcome
from interp_hooks.conformance.own import NO_SOFTMAX
from interp_hooks.errors import InterpError
from interp_hooks.hooking import hook

#: seconds an architecture may take
LIMIT = 240

Standing = Literal["equal", "wrong", "refused", "no config", "no attention", "error", "time"]


@dataclass
class Row:
    """An architecture's standing, and the reason.

    Attributes:
        kind, model_type: which.
        status: equal; wrong (a difference); refused (on load, with a sentence); no config (no tiny
            model could be built and run); no attention (no softmax attention to tap); error (an
            exception that is none of ours); time (over the limit).
        reason: the sentence, or the worst difference.
        compared: how many comparisons were equal.
        refused, unavailable: parts refused by the toolkit; parts that the untouched model can't.
    """

    kind: str
    model_type: str
    status: Standing
    reason: str = ""
    compared: int = 0
    refused: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def examine(kind: str, model_type: str) -> Row:
    """One architecture, here and now."""
    bare = NO_SOFTMAX.get(model_type)
    try:
        built = build(kind, model_type)
    except Exception as error:
        if bare:
            return Row(kind, model_type, "no attention", bare)
        return Row(kind, model_type, "no config", _told(error))
    try:
        model = hook(built.module, processor=built.processor, sample=built.padded or built.inputs)
    except InterpError as error:
        return Row(kind, model_type, "no attention" if bare else "refused", bare or str(error))
    except Exception as error:
        return Row(kind, model_type, "error", f"on load: {_told(error)}")
    try:
        outcomes = Comparison(model, built.inputs, built.padded).run()
    except Exception as error:
        return Row(kind, model_type, "error", _told(error))
    return summed(kind, model_type, outcomes)


def summed(kind: str, model_type: str, outcomes: Iterable[Outcome]) -> Row:
    """What the comparisons of one architecture come to."""
    outcomes = list(outcomes)

    def those(status: str) -> list[str]:
        named = (f"{o.mode} {o.check}: {o.detail}" for o in outcomes if o.status == status)
        return list(dict.fromkeys(named))

    wrong = those("wrong")
    row = Row(kind, model_type, "wrong" if wrong else "equal", "; ".join(wrong[:3]))
    row.compared = sum(o.status == "equal" for o in outcomes)
    row.refused, row.unavailable, row.wrong = those("refused"), those("unavailable"), wrong
    return row


def _told(error: BaseException) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = str(error).split("\n")[0][:160]
    return f"{type(error).__name__}: {first} ({os.path.basename(frame.filename)}:{frame.lineno})"


def sweep(
    wanted: Iterable[tuple[str, str]], told: Callable[[Row], None], jobs: int = 1
) -> list[Row]:
    """Examines (kind, model type) pairs, `jobs` at a time; `told` gets each row as it comes."""
    queue, rows = list(wanted)[::-1], []
    running: dict[int, tuple[int, str, str, float]] = {}  # read end → pid, kind, type, start
    while queue or running:
        while queue and len(running) < jobs:
            kind, model_type = queue.pop()
            read, pid = _started(kind, model_type)
            running[read] = (pid, kind, model_type, time.monotonic())
        ready, _, _ = select.select(list(running), [], [], 1.0)
        for read, (pid, kind, model_type, start) in list(running.items()):
            late = time.monotonic() - start > LIMIT
            if read not in ready and not late:
                continue
            row = _ended(read, pid, kind, model_type, late)
            del running[read]
            rows.append(row)
            told(row)
    return rows


def _started(kind: str, model_type: str) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()  # the libraries are imported once, here
    if pid:
        os.close(write)
        return read, pid
    os.close(read)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        text = json.dumps(asdict(examine(kind, model_type)))
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)
    finally:
        os._exit(0)


def _ended(read: int, pid: int, kind: str, model_type: str, late: bool) -> Row:
    if late:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        text = "" if late else pipe.read()
    os.waitpid(pid, 0)
    if late:
        return Row(kind, model_type, "time", f"over {LIMIT} s")
    if not text:
        return Row(kind, model_type, "error", "the process died")
    loaded: dict[str, Any] = json.loads(text)
    return Row(**loaded)
