"""The tables of real_table.py as markdown, put between a page's markers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- real table: begin -->", "<!-- real table: end -->"
METRICS = {"needles": "needles", "repeat": "loss, second repeat", "prose": "loss, English"}
TITLES = dict(
    a="The strongest heads taken out",
    b="Edits that are published as cures",
    c="By length",
    d="Three libraries",
)


def write(results: Path, page: Path) -> None:
    """Put the tables of a results file between the markers of a page."""
    content = json.loads(results.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    tables = "\n".join(markdown(content))
    page.write_text(f"{head}{BEGIN}\n\n{tables}\n{END}{tail}", encoding="utf-8")


def markdown(content: dict[str, Any]) -> Iterator[str]:
    """Line by line: what it was measured with, then a section a part that is there."""
    about, cells = content["about"], content["cells"]
    took = sum(about.get("seconds", {}).values()) / 60
    yield (
        f"{about['model']}, {about['dtype']}, {about['hardware']}, {about['date']}, "
        f"{took:.0f} minutes of cells, several at a time; brackets are 95 % intervals."
    )
    for part, table in (("a", taken_out), ("b", cures), ("c", by_length), ("d", libraries)):
        if any(name.startswith(f"{part}/") for name in cells):
            yield from ("", f"### {TITLES[part]}", "")
            yield from table(cells)


def rows(header: list[str], body: list[list[str]]) -> Iterator[str]:
    """A markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in body:
        yield f"| {' | '.join(row)} |"


def interval(found: dict[str, Any], sign: str = "") -> str:
    """ "0.94 [0.81, 1.00]"."""
    return f"{found['mean']:{sign}.2f} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"


def taken_out(cells: dict[str, Any]) -> Iterator[str]:
    """Top heads, and the mean and range of the screened draws."""
    body = [["untouched", "", *(interval(cells["a/untouched"][m]) for m in METRICS)]]
    for kind in ("retrieval", "induction", "sink"):
        if (top := cells.get(f"a/{kind}/top")) is None:
            continue
        heads = ", ".join(top["heads"])
        body.append([f"8 {kind} heads", heads, *(interval(top[m]) for m in METRICS)])
        if kind == "sink" and (idle := cells.get("a/idle/top")):
            others = ", ".join(idle["heads"])
            body.append(["8 sinks that do not copy", others, *(interval(idle[m]) for m in METRICS)])
        draws = [c for n, c in cells.items() if n.startswith(f"a/{kind}/draw")]
        means = {m: [d[m]["mean"] for d in draws] for m in METRICS}
        spread = [f"{sum(v) / len(v):.2f} ({min(v):.2f} … {max(v):.2f})" for v in means.values()]
        body.append([f"{len(draws)} draws", "same layers, below the threshold", *spread])
    yield from rows(["taken out", "heads", *METRICS.values()], body)
    yield from ("", f"Format: {cells['a/format']}. Draws: mean (least … most).")


def cures(cells: dict[str, Any]) -> Iterator[str]:
    """A row an edit, a column a task: the paired change."""
    columns = sorted(
        (n.split("/")[1] for n in cells if n.startswith("b/") and n.endswith("/level")),
        key=lambda c: (
            c.startswith("needles"),
            int("".join(filter(str.isdigit, c.split(", ", 1)[1]))),
        ),
    )
    names = list(
        dict.fromkeys(
            n.split("/", 2)[2]
            for n in cells
            if n.startswith("b/")
            and n.split("/")[1] in (*columns, "loss")
            and "difference" in cells[n]
        )
    )
    losses = [cells[n] for n in cells if n.startswith("b/loss/")]
    level = [interval(cells[f"b/{c}/level"]) for c in columns]
    body = [["untouched", *level, interval(losses[0]["baseline"]) if losses else ""]]
    for name in names:
        found = [cells.get(f"b/{c}/{name}") for c in (*columns, "loss")]
        body.append([name, *("–" if f is None else interval(f["difference"], "+") for f in found)])
    sizes = [f"{c} (n = {cells[f'b/{c}/level']['n']})" for c in columns]
    yield from rows(["edit", *sizes, "loss of a continuation"], body)
    for name, found in cells.items():
        if not name.startswith("b/calibrated/"):
            continue
        _, _, method, column = name.split("/")
        costs = [
            f"{what} {interval(found[what]['difference'], '+')}"
            for what in ("needles", "loss")
            if what in found
        ]
        yield ""
        before = f"from {found['baseline']['mean']:.2f}"
        yield (
            f"Calibrated by {method} on 32 texts of {column}: {found['train']['mean']:+.2f} on "
            f"those, held out {interval(found['heldout'], '+')} {before}; "
            f"elsewhere: {', '.join(costs) or 'nothing chosen, nothing changed'}."
        )


def by_length(cells: dict[str, Any]) -> Iterator[str]:
    """A row a length."""
    lengths = sorted({int(n.rsplit("/", 1)[1]) for n in cells if n.startswith("c/")})
    body = []
    for length in lengths:
        sink, retrieval, induction = (
            cells.get(f"c/{kind}/{length}") for kind in ("sink", "retrieval", "induction")
        )
        body.append(
            [
                f"{length:,}",
                "–" if sink is None else f"{sink['heads']} (mean {sink['mean']:.2f})",
                "–" if retrieval is None else f"{retrieval['solved']} of {retrieval['of']}",
                "–" if retrieval is None else f"{retrieval['above']}: {strongest(retrieval)}",
                "–" if induction is None else f"{induction['above']}: {strongest(induction)}",
            ]
        )
    yield from rows(
        ["tokens", "heads with sink ≥ 0.3", "needles", "retrieval ≥ 0.1", "induction ≥ 0.4"], body
    )


def strongest(found: dict[str, Any]) -> str:
    """The first three heads."""
    return ", ".join(f"{head} {value:.2f}" for head, value in list(found["top"].items())[:3])


def libraries(cells: dict[str, Any]) -> Iterator[str]:
    """The largest difference of any head from HuggingFace, on the same ids."""
    found = cells["d/largest difference"]
    scores = list(next(iter(found.values())))
    body = [[name, *(f"{values[s]:.1e}" for s in scores)] for name, values in found.items()]
    yield from rows(["library", *scores], body)
