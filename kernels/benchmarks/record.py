"""What the GPU benchmarks share: rows that are saved as they come and resumed, floors, bars, and
clocks.

A result file is {"what", "gpu", "date", "revision", "versions", "rows": […]}. A row has "name",
"length" and, with a figure to reach, "of", "bar", "goal". "measured" is the date it was measured,
or "not measured", "failed" or "skipped" (with "error"), or "started" (with "stopped", how many runs
did not end it). Only a measured row has figures: "ms" (median), "spread" (how far two rounds of the
same measurement are apart, relative), "floor_ms", "ratio" (to the row named by "of", or the share
of the bandwidth) and "met" ("goal", "bar", "missed").
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# from a checkout without an installation; the interpreter must be chosen before the kernels are
# imported
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "hooks")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"
#: What "of" says where the ratio is floor_ms / ms, the share of the memory's bandwidth that was
#: reached.
BANDWIDTH = "bandwidth"
#: GPU → (bf16 FLOP/s of a large product on random data, bytes/s of a copy, read and written both
#: counted).
CEILINGS = {"h200": (788e12, 4.3e12), "h100": (798e12, 3.0e12)}
NO_GPU = (
    "No CUDA device was found, and this measures a GPU; --smoke runs the same code on a CPU, "
    "tiny and untimed."
)

#: Exit code of a process whose device is lost; another one goes on from there.
BROKEN = 3

Row = dict[str, Any]


class Skip(Exception):
    """A row that this machine cannot measure, with the reason."""


# --- where and on what
# ----------------------------------------------------------------------------------------


def slug(device: torch.device) -> str:
    """ "h200" of "NVIDIA H200", "h100" of "NVIDIA H100 80GB HBM3"; "cpu" without a GPU."""
    if device.type != "cuda":
        return "cpu"
    words = torch.cuda.get_device_name(device).replace("NVIDIA", "").split()
    return "".join(c for c in words[0].lower() if c.isalnum()) if words else "gpu"


def ceilings(device: torch.device) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that floors are counted with; a GPU not in `CEILINGS` is measured."""
    known = CEILINGS.get(slug(device), CEILINGS["h200"])
    return (
        measured_ceilings(device)
        if device.type == "cuda" and slug(device) not in CEILINGS
        else known
    )


def measured_ceilings(device: torch.device) -> tuple[float, float]:
    """The same two, measured: a bf16 product of 8192 × 8192 on random data, and a copy of 4 GB."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = timed(lambda: a @ a, device)[0]
    source = torch.randn(1 << 30, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device)[0]
    return 2 * 8192**3 / product * 1e3, 2 * (4 << 30) / copy * 1e3


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "triton", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@lru_cache
def revision() -> str | None:
    """The commit, "+" if files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "-uno", "kernels")
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(script: str) -> str:
    """Of the kernels' sources and the benchmark's: what a row was measured with, committed or
    not."""
    made = hashlib.sha256()
    for path in [
        *sorted((ROOT / "kernels/interp_kernels").rglob("*.py")),
        Path(__file__),
        Path(script),
    ]:
        made.update(path.read_bytes())
    return made.hexdigest()[:12]


def place(name: str, device: torch.device, out: str | None) -> tuple[Path, list[Path]]:
    """(where to write, where earlier rows may be): `out`, else $OUT, else results/ beside this
    file."""
    if out:
        return Path(out), [Path(out)]
    file = f"{slug(device)}_{name}.json"
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / file, [folder / file, RESULTS / file]


def planned(
    name: str, length: int, of: str = "", bar: float | None = None, goal: float | None = None
) -> Row:
    """A row nobody has measured."""
    return dict(name=name, length=length, of=of, bar=bar, goal=goal, measured=NOT_MEASURED)


def at_least(row: Row) -> bool:
    """Whether more is better: shares of the memory's bandwidth."""
    return row["of"] == BANDWIDTH


def judge(row: Row) -> str | None:
    """ "goal", "bar" or "missed"; None without a bar."""
    if row.get("ratio") is None or row["bar"] is None:
        return None
    for name in ("goal", "bar"):
        if row["ratio"] >= row[name] if at_least(row) else row["ratio"] <= row[name]:
            return name
    return "missed"


class Record:
    """The rows of one machine, in the order planned, written to a file after every change."""

    def __init__(
        self,
        path: Path,
        header: Row,
        plan: Iterable[Row],
        sources: str,
        earlier: Sequence[Path],
        again: bool,
    ):
        self.path, self.header, self.sources = path, header, sources
        self.extra: Row = {}
        self.rows: dict[tuple[str, int], Row] = {(r["name"], r["length"]): r for r in plan}
        for file in earlier:
            if file.is_file():
                self._take(json.loads(file.read_text(encoding="utf-8")), again)
                break

    def _take(self, old: Row, again: bool) -> None:
        """Rows measured on the same machine with the same versions stand until they are measured
        anew."""
        if any(old.get(key) != self.header[key] for key in ("gpu", "versions", "shape")):
            return
        self.extra = (
            {} if again else {k: v for k, v in old.items() if k not in self.header and k != "rows"}
        )
        for row in old["rows"]:
            key = row["name"], row["length"]
            if key in self.rows and row["measured"] != NOT_MEASURED:
                kept = {
                    **self.rows[key],
                    **{k: v for k, v in row.items() if k not in ("of", "bar", "goal")},
                }
                if kept["measured"] == "started" and kept["stopped"] > 1:
                    kept |= dict(
                        measured="failed", error="did not end before two runs were stopped"
                    )
                elif kept["measured"] == "started":
                    kept["measured"] = NOT_MEASURED
                self.rows[key] = dict(kept, sources="") if again else kept

    def todo(self, name: str, length: int) -> bool:
        """Whether this row still has to be measured with these sources."""
        row = self.rows[name, length]
        return row["measured"] == NOT_MEASURED or row.get("sources") != self.sources

    def put(self, name: str, length: int, **found: Any) -> Row:
        """A row's new state, saved at once."""
        old = {k: self.rows[name, length][k] for k in ("name", "length", "of", "bar", "goal")}
        self.rows[name, length] = dict(old, **found, sources=self.sources)
        self.write()
        return self.rows[name, length]

    def write(self) -> None:
        """Ratios follow what is measured by now; the file is whole at every moment."""
        for row in self.rows.values():
            base = self.rows.get((row["of"], row["length"]))
            if row.get("ms") and at_least(row):
                row["ratio"] = round(row["floor_ms"] / row["ms"], 3)
            elif row.get("ms") and base is not None and base.get("ms"):
                row["ratio"] = round(row["ms"] / base["ms"], 3)
            if row.get("ratio") is not None and (met := judge(row)):
                row["met"] = met
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(
            dumps({**self.header, **self.extra, "rows": list(self.rows.values())}), encoding="utf-8"
        )
        part.replace(self.path)


def dumps(result: Row) -> str:
    """JSON with a row a line."""
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    head = json.dumps(
        {k: v for k, v in result.items() if k != "rows"}, indent=1, ensure_ascii=False
    )
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def line(row: Row) -> str:
    """One row for a log."""
    start = f"{row['length']:>7} {row['name']:<58}"
    if row.get("error"):
        return f"{start} {row['measured']}: {row['error']}"
    if "ms" not in row and "ratio" not in row:
        return f"{start} {row['measured']}"
    text = f"{row['ms']:10.3f} ms ±{row['spread']:.1%}" if "ms" in row else " " * 19
    if row.get("floor_ms"):
        text += f"  floor {row['floor_ms']:.3f}"
    if row.get("ratio") is not None:
        text += f"  {row['ratio']:.3f} of {row['of']}"
    return f"{start}{text}  {row.get('met', '')}".rstrip()


def summary(book: Record) -> str:
    """How many bars are met."""
    bars = [row for row in book.rows.values() if row["bar"] is not None]
    done = [row for row in bars if row.get("met")]
    met = sum(row["met"] != "missed" for row in done)
    return f"{met} of {len(bars)} bars met, {len(bars) - len(done)} not measured:"


@contextlib.contextmanager
def recorded(record: Record, name: str, length: int) -> Iterator[Row]:
    """A block that measures one row into the yielded dict. Its failure becomes the row; an
    interrupt passes."""
    record.put(
        name, length, measured="started", stopped=record.rows[name, length].get("stopped", 0) + 1
    )
    found: Row = {}
    try:
        yield found
        found = {"measured": time.strftime("%Y-%m-%d"), **found}
    except Skip as reason:
        found = dict(measured="skipped", error=str(reason))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        found = dict(measured="failed", error=" ".join(text[:3])[:300])
    print(line(record.put(name, length, **found)), flush=True)
    tidy()


def tidy() -> None:
    """Free memory; exit with `BROKEN` if an earlier fault has made the device unusable for this
    process."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as reason:
            print(
                f"The device is lost for this process ({str(reason).splitlines()[0]}); the same "
                "command goes on."
            )
            raise SystemExit(BROKEN) from None


def timed(
    run: Callable[[], Any], device: torch.device, seconds: float = 1.0, flush: bool = True
) -> list[float]:
    """Milliseconds of one call: the medians of two rounds, each of about `seconds`, after a
    warm-up. On a GPU by events, the cache flushed before each call; on a CPU (a smoke test) one
    call."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)]
    run()
    wipe = torch.empty(256 << 20, dtype=torch.uint8, device=device) if flush else None
    count = 1
    medians = []
    for stage in range(3):  # the first finds out how many calls fill a round
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for begin, end in events:
            if wipe is not None:
                wipe.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        medians.append(statistics.median(begin.elapsed_time(end) for begin, end in events))
        if stage == 0:
            count = max(3, min(50, int(1e3 * seconds / max(medians[0], 1e-3))))
    return medians[1:]


def timed_graph(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 8
) -> list[float]:
    """Milliseconds of one of `calls`, replayed as a CUDA graph that runs all of them `repeats`
    times over: short kernels without the gaps between launches. Calls on different data keep the
    cache from helping."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm-up: compiles, and allocates where a capture may not
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return [
        ms / repeats / len(calls) for ms in timed(graph.replay, device, seconds=0.5, flush=False)
    ]


def figures(times: Sequence[float]) -> Row:
    """ms and spread of rounds of one measurement."""
    ms = sum(times) / len(times)
    return dict(ms=round(ms, 4), spread=round((max(times) - min(times)) / ms, 4))
