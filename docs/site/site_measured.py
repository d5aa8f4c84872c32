"""What was measured, for the catalogue's pages: scans and circuits of SmolLM2 (measured.json, made
by measure.py), and the rows of committed result tables that name an entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from site_figures import heat_map, number

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


@cache
def measured() -> dict[str, Any]:
    """The content of measured.json."""
    return json.loads((HERE / "measured.json").read_text(encoding="utf-8"))


def score_section(score: Any) -> str:
    """Heat map and typical values of a score, as markdown; why there are none, where so."""
    found = measured()["scores"].get(score.name)
    if found is None:
        return f"No value: {_why_not(score)}\n"
    about = measured()["scans"][found["scan"]]
    places = _places(found["values"], score.grain)
    count = ""
    if score.threshold is not None:
        above = sum(v >= score.threshold for _, v in places)
        count = f"| at {number(score.threshold)} or more | {above} of {len(places)} |\n"
    span = (score.low, score.high) if None not in (score.low, score.high) else None
    values = sorted(v for _, v in places)
    signed = values[0] < 0
    ends = f"| lowest | {_listed(places[::-1][:3])} |\n" if signed else ""
    model = about["model"] + (", the eye's heads" if found["tower"] == "vision" else "")
    return (
        f"{_figure(found['values'], score.title, span, score.threshold)}\n"
        f"{_caption(score.threshold)}\n\n"
        f"| {model} | |\n|---|---|\n"
        f"| strongest | {_listed(places[:5])} |\n{ends}"
        f"| median | {number(median(values))} |\n"
        f"| nine tenths lie below | {number(values[int(0.9 * (len(values) - 1))])} |\n{count}"
        f"| measured on | {found['measured'] or 'the weights alone'} |\n\n"
        f"{about['hardware']}, {about['date']}; weights {about['weights']}.\n"
    )


def drawn(markdown: str) -> str:
    """A page with a heat map in place of each <!-- heads: SCORE -->."""

    def figure(found: re.Match[str]) -> str:
        from interp.scores import get

        score, values = get(found[1]), measured()["scores"][found[1]]["values"]
        span = (score.low, score.high) if None not in (score.low, score.high) else None
        map_of = _figure(values, score.title, span, score.threshold)
        return f"{map_of}\n{_caption(score.threshold)}\n"

    maps = re.sub(r"<!-- heads: (\w+) -->", figure, markdown)
    return maps.replace("<!-- sentence -->", _sentence()) if "<!-- sentence -->" in maps else maps


def _sentence() -> str:
    """The start page's sentence, each token shaded by the weight that its last one gives it."""
    found = measured()["sentence"]
    shaded = (
        f'<span style="--weight: {weight:g}" title="{number(weight)}">{escape(token)}</span>'
        for token, weight in zip(found["tokens"], found["weights"], strict=True)
    )
    said = f"Tokens of the sentence, shaded by the weight that {found['head']} gives them"
    return f'<p class="sentence" role="img" aria-label="{said}">{"".join(shaded)}</p>\n'


def circuit_section(name: str) -> str:
    """The heads that a circuit method finds for IOI, as markdown; "" where it was not run."""
    found = measured()["circuits"].get(name)
    if found is None:
        return ""
    places = _places(found["values"], "head")
    ends = f"| lowest | {_listed(places[::-1][:3])} |\n" if places[-1][1] < 0 else ""
    what = "its signed effect" if found["signed"] else "its score"
    return (
        f"{_figure(found['values'], name, None, None)}\n"
        f"Each head and {what} on IOI. Hover a cell for its value.\n\n"
        f"| {found['model']} | |\n|---|---|\n"
        f"| highest | {_listed(places[:5])} |\n{ends}"
        f"| measured on | {found['n']} pairs of prompts, seed {found['seed']} |\n\n"
        f"{found['hardware']}, {found['date']}. One task and one model; which heads come first "
        "depends on the stand-in and on the truth ([results](../../results.md)).\n"
    )


def task_section(name: str) -> str:
    """How the untouched model does on a task, as markdown; "" where it was not asked."""
    found = measured()["tasks"].get(name)
    if found is None:
        return ""
    low, high = found["low"], found["high"]
    guessing = f"| by guessing | {found['chance']:.2f} |\n" if found["chance"] else ""
    return (
        f"| {found['model']} | |\n|---|---|\n"
        f"| {found['metric']} | {found['mean']:.2f} [{low:.2f}, {high:.2f}] |\n{guessing}"
        f"| problems | {found['n']} |\n"
        f"| asked as | {found['format']} |\n\n"
        f"Untouched, with a 95 % interval; {found['hardware']}, {found['date']}.\n"
    )


def result_rows(kind_names: dict[str, str], name: str) -> str:
    """Rows of the committed result tables that are about an entry, as markdown.

    Args:
        kind_names: entry → its class's name, of all entries of the kind: a row belongs to the one
            whose name is the longest that it begins with.
        name: the entry.
    """
    parts = []
    for title, header, rows in _tables():
        own = [row for row in rows if _of(row[0], kind_names) == name]
        if own:
            lines = [f"| {' | '.join(row)} |" for row in own]
            parts.append(
                f"**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n"
                + "\n".join(lines)
            )
    return "\n\n".join(parts)


def _tables() -> Iterator[tuple[str, list[str], list[list[str]]]]:
    yield _real_table()
    yield _vision_table()
    yield _edit_table()
    yield _circuit_table()


def _real_table() -> tuple[str, list[str], list[list[str]]]:
    cells = _read("real_table.json")["cells"]
    named = dict.fromkeys(n.split("/")[1] for n in cells if n.startswith("b/"))
    columns = sorted((c for c in named if c != "calibrated"), key=_task_order)
    rows: dict[str, dict[str, str]] = {}
    for name, cell in cells.items():
        if name.startswith("b/") and isinstance(cell, dict) and "difference" in cell:
            _, column, row = name.split("/", 2)
            rows.setdefault(row, {})[column] = _change(cell["difference"])
    table = [[row, *(found.get(c, "") for c in columns)] for row, found in rows.items()]
    return (
        "SmolLM2-135M-Instruct, changes of accuracy (loss in nats; up is worse)",
        ["", *columns],
        table,
    )


def _task_order(column: str) -> tuple[int, str]:
    """Classification first, then needles, then the loss."""
    return ("needles" in column) + 2 * (column == "loss"), column


def _vision_table() -> tuple[str, list[str], list[list[str]]]:
    metrics = ("CHAIR_I", "object F1")
    table = [
        [name, *(_change(row["noise"][m]["difference"]) for m in metrics)]
        for name, row in _read("vision_table.json")["methods"].items()
        if name != "greedy"
    ]
    return "smol-llava, captions of noisy pictures, changes", ["", *metrics], table


def _edit_table() -> tuple[str, list[str], list[list[str]]]:
    edits = _read("edit_table.json")["edits"]
    columns = list(next(iter(edits.values()))["cells"])
    table = [
        [name, *(_change(row["cells"][c]["change"]) for c in columns)]
        for name, row in edits.items()
    ]
    return "pocket-llama, changes of accuracy (loss in nats; up is worse)", ["", *columns], table


def _circuit_table() -> tuple[str, list[str], list[list[str]]]:
    """Heads, against the truth by resampling and the known ones."""
    result = _read("circuit_table.json")
    rows: dict[str, dict[str, str]] = {}
    for r in result["rows"]:
        if r["ranked"] == "heads" and r["truth"] in ("resample", "known"):
            cell = f"{r['auc']:.2f} [{r['auc_low']:.2f}, {r['auc_high']:.2f}]"
            rows.setdefault(r["method"], {})[r["case"]] = cell
    table = [[name, *(cells.get(c, "") for c in result["cases"])] for name, cells in rows.items()]
    title = "pocket-llama (truth by resampling) and constructed circuits, ROC AUC of heads"
    return title, ["", *result["cases"]], table


def _of(row: str, kind_names: dict[str, str]) -> str:
    """The entry that a row of a table is about; "" for none."""
    said = _plain(row)
    fits = [
        (len(form), entry)
        for entry, cls in kind_names.items()
        for form in {_plain(entry), _plain(cls)}
        if re.match(rf"{re.escape(form)}(?![a-z])", said)
    ]
    return max(fits, default=(0, ""))[1]


def _plain(name: str) -> str:
    return re.sub(r"[ _-]", "", name.split(",")[0].split(" without")[0]).lower()


def _change(cell: dict[str, Any]) -> str:
    """ "−0.04 [−0.06, −0.01]"; a plain 0 where nothing changed."""
    if cell["mean"] == cell["low"] == cell["high"] == 0:
        return "0"
    digits = 3 if abs(cell["high"] - cell["low"]) < 0.03 else 2
    mean, low, high = (f"{cell[k]:+.{digits}f}".replace("-", "−") for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))


def _figure(values: Any, title: str, span: Any, threshold: float | None) -> str:
    return f'<div class="heads">{heat_map(values, title, span, threshold)}</div>\n'


def _caption(threshold: float | None) -> str:
    marked = (
        f" Outlined in red: {number(threshold)} or more, from which a head counts."
        if threshold is not None
        else ""
    )
    return f"Every head of every layer, layer 0 at the top.{marked} Hover a cell for its value."


def _places(values: list[list[float | None]], grain: str) -> list[tuple[str, float]]:
    """(place, value), strongest first: once a head, key/value head or layer."""
    groups = {"layer": lambda row: len(row), "kv_head": lambda row: measured()["query_heads"]}
    found: list[tuple[str, float]] = []
    for layer, row in enumerate(values):
        step = groups[grain](row) if grain in groups else 1
        for head in range(0, len(row), step):
            value = row[head]
            if value is not None:
                kind = {"layer": "", "kv_head": f"KV{head // step}"}.get(grain, f"H{head}")
                found.append((f"L{layer}{kind}", value))
    return sorted(found, key=lambda place: -place[1])


def _listed(places: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{place} {number(value)}" for place, value in places)


def _why_not(score: Any) -> str:
    if score.needs_site == "learned_sinks":
        return "SmolLM2 has no learned sinks. Models like gpt-oss have."
    if score.needs_site == "output_gate":
        return "SmolLM2's heads have no output gate. Qwen3-Next's and Qwen3.5's have."
    if score.tower == "vision":
        return "smol-llava's eye is no tower that this score reads."
    return "it was not measured on SmolLM2 yet."
