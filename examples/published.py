"""What the scripts of the tables share: numbers as pages print them, and how a result is written,
stamped with machine, date and versions, and put into its page."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def interval(value: dict[str, float], shown: Callable[[float], str]) -> str:
    """ "0.85 [0.82, 0.88]"."""
    return f"{shown(value['mean'])} [{shown(value['low'])}, {shown(value['high'])}]"


def change(value: dict[str, float], digits: int) -> str:
    """A difference with its signs; bold where the interval leaves 0 out, "0" where all of it rounds
    to that."""

    def signed(x: float) -> str:
        return f"{x:+.{digits}f}".replace("-", "−") if round(x, digits) else "0"

    shown = {signed(value[k]) for k in ("mean", "low", "high")}
    if shown == {"0"}:
        return "0"
    text = interval(value, signed)
    clear = (value["low"] > 0 or value["high"] < 0) and "0" not in shown
    return f"**{text}**" if clear else text


def put(text: str, table: str, begin: str, end: str) -> str:
    """`text` with `table` between the markers."""
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x for x in lines if x.startswith("model name")]
    own = platform.processor() or platform.machine()
    return names[0].partition(":")[2].strip() if names else own


def stamp() -> dict[str, Any]:
    """date, machine and versions: what stands beside every published number."""
    return dict(
        date=time.strftime("%Y-%m-%d"),
        machine=f"{cpu()}, threads: {torch.get_num_threads()}",
        versions={p: version(p) for p in ("torch", "transformers", "interp")},
    )


def earlier(options: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What `--out` holds already, {} where there is no such file: long tables are measured a part
    at a time, and a part goes in beside the others only if it has their settings.

    Raises:
        SystemExit: the file was measured with other settings.
    """
    path = Path(options.out)
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    other = {key: found.get(key) for key, value in settings.items() if found.get(key) != value}
    if other:
        asked = {key: settings[key] for key in other}
        raise SystemExit(f"{path} was measured with {other}, not {asked}; give another --out.")
    return found


def where(stamps: Iterable[dict[str, Any]]) -> str:
    """ "AMD EPYC, threads: 1, 2026-11-29", each machine and day once."""
    return "; ".join(dict.fromkeys(f"{one['machine']}, {one['date']}" for one in stamps))


def parser(about: str | None, name: str, n: int, threads: int = 2) -> argparse.ArgumentParser:
    """--n, --seed, --threads, --out examples/NAME.json, --page: the options of every such
    script."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--n", type=int, default=n)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=threads)
    made.add_argument("--out", default=f"examples/{name}.json")
    made.add_argument("--page", help="a page to put the tables into: docs/results.md")
    return made


def publish(
    result: dict[str, Any], table: str, options: argparse.Namespace, begin: str, end: str
) -> None:
    """Writes the JSON, prints the table, and puts it between the markers of the page."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    Path(options.out).write_text(text, encoding="utf-8")
    print(table)
    if options.page:
        page = Path(options.page)
        filled = put(page.read_text(encoding="utf-8"), table, begin, end)
        page.write_text(filled, encoding="utf-8")
