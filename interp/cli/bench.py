"""`interp bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import note, out
from interp.costs.benchmarks import NOT_MEASURED, committed, read
from interp.errors import InputError, OutputError


def bench(
    results: Annotated[
        Path | None,
        typer.Option(
            help="A folder of other results; those of this version if not given.", metavar="DIR"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object as JSON: file name → what it holds.")
    ] = False,
) -> None:
    """Show what was measured of this toolkit's speed and memory, and on what machine."""
    folder = results or committed()
    files = sorted(folder.glob("*.json")) if folder is not None else []
    kinds = [
        _load(file)
        for file in files
        if file.stem in CPU or file.stem.endswith(("_kernels", "_model"))
    ]
    if not kinds:
        raise InputError(
            f"There are no benchmark results in {folder}; kernels/benchmarks/gpu.sh writes some."
        )
    if as_json:
        emit({file.stem: result for file, result in kinds})
        return
    for file, result in kinds:
        try:
            CPU[file.stem](result) if file.stem in CPU else _gpu(file, result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(
                f"{file} is no benchmark result: {type(error).__name__}, {error}."
            ) from error


def _load(file: Path) -> tuple[Path, dict[str, Any]]:
    return file, read(file)


def _heading(title: str, result: dict[str, Any], machine: str) -> None:
    parts = [machine, result["date"], *(f"{k} {v}" for k, v in result["versions"].items())]
    out().print(Text.assemble((title, "bold"), ": " + ", ".join(parts)), soft_wrap=True)


def _gpu(file: Path, result: dict[str, Any]) -> None:
    """A table a length: rows that have a bar, and all that were measured."""
    _heading("Kernels" if file.stem.endswith("_kernels") else "Whole model", result, result["gpu"])
    rows = [
        row for row in result["rows"] if row["measured"] != NOT_MEASURED or row["bar"] is not None
    ]
    figures = ["ms", "floor", "ratio"] if any("ms" in row for row in rows) else []
    columns = ["of", *figures, "bar", "goal", "met"]
    for length in dict.fromkeys(row["length"] for row in rows):
        table = common.table(
            "", *columns, right=("ms", "floor", "ratio", "bar", "goal"), title=f"{length:,} tokens"
        )
        for row in rows:
            if row["length"] == length:
                cells = _cells(row)
                table.add_row(row["name"], *(cells[column] for column in columns))
        out().print(table)
    if any(row["measured"] == NOT_MEASURED for row in rows):
        note(
            "Not measured: no GPU was at hand. kernels/benchmarks/gpu.sh measures, on any machine "
            "that has one."
        )


def _cells(row: dict[str, Any]) -> dict[str, str | Text]:
    sign = "≥" if row["of"] == "bandwidth" else "≤"

    def number(value: float | None, mark: str = "") -> str:
        """A share of memory as percentage, anything else as factor."""
        if value is None:
            return ""
        return (
            f"{mark} {value:.1%}"
            if row["name"].startswith("extra peak memory")
            else f"{mark} {value:.2f}"
        )

    state = Text(row["measured"], style="dim")
    if row.get("error"):
        state = Text(f"{row['measured']}: {row['error']}", style="dim")
    elif row["measured"] not in (NOT_MEASURED, "started"):
        missed = row.get("met") == "missed"
        state = Text("no" if missed else row.get("met", ""), style="bold red" if missed else "")
    return {
        "of": row["of"],
        "ms": f"{row['ms']:.3f}" if "ms" in row else "",
        "floor": f"{row['floor_ms']:.3f}" if "floor_ms" in row else "",
        "ratio": number(row.get("ratio")),
        "bar": number(row["bar"], sign),
        "goal": number(row["goal"], sign),
        "met": state,
    }


def _cpu(result: dict[str, Any]) -> None:
    """Times of one forward, as multiples of the plain one."""
    _heading("Whole model", result, result["machine"])
    ways = ("cheap", "full", "eager", "transformer_lens")
    titles = [way.replace("transformer_lens", "TL") for way in ways]
    table = common.table(
        "model", "tokens", "plain s", *titles, right=("tokens", "plain s", *titles)
    )
    table.columns[0].no_wrap = True
    for row in result["rows"]:
        ratios = (row["ratios"].get(f"{way} / plain") for way in ways)
        cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(row["model"], f"{row['length']:,}", f"{row['plain']['seconds']:.3f}", *cells)
    out().print(table)
    note(
        f"{result['what'].strip()} Times are multiples of the plain forward's; TL is "
        "TransformerLens."
    )


def _edits(result: dict[str, Any]) -> None:
    """What edits cost, as multiples of the plain forward's time."""
    _heading("Edits, whole model", result, result["machine"])
    right = ("tokens", "attention", "ratio", "bar", "extra MB")
    table = common.table(
        "model", "tokens", "attention", "edit", "ratio", "bar", "met", "extra MB", right=right
    )
    table.columns[0].no_wrap = True
    for row in result["rows"]:
        first = (row["model"], f"{row['length']:,}", f"{row['attention_share']:.0%}")
        for edit in row["edits"]:
            bar = "" if edit["bar"] is None else f"≤ {edit['bar']:.2f}"
            met = (
                ""
                if edit["met"] is None
                else Text("yes")
                if edit["met"]
                else Text("no", style="bold red")
            )
            table.add_row(
                *first, edit["edit"], f"{edit['ratio']:.2f}", bar, met, f"{edit['extra_mb']:.0f}"
            )
            first = ("", "", "")
    out().print(table)
    note(f"{result['what']} {result['rounds']} rounds; load of the machine {result['load']:.1f}.")


#: what shows a result of the CPU, by file name
CPU: dict[str, Callable[[dict[str, Any]], None]] = {"cpu": _cpu, "cpu_edits": _edits}
