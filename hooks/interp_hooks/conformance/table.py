"""docs/models.md: the table of architectures as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from interp_hooks.conformance.sweep import Row

TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Encoder-decoders for text",
    "speech": "Speech",
    "image": "Image classification",
    "vlm": "Vision-language models",
}
#: statuses in the order of the page, and what they mean
MEANING = {
    "equal": "every comparison agrees with eager attention",
    "wrong": "a comparison differs",
    "error": "an exception without a sentence",
    "time": "over the time limit",
    "refused": "refused on load, with the sentence given",
    "no attention": "has no softmax attention",
    "no config": "no tiny model could be built and run, so nothing is known",
}


def write(path: Path, rows: Sequence[Row], about: Mapping[str, str]) -> None:
    """Writes the page of these rows, taken with the versions and on the day that `about` says."""
    path.write_text(page(rows, about))


def page(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """The page's Markdown."""
    lines = [
        "# Architectures",
        "",
        "Every architecture of transformers "
        f"{about.get('transformers', '?')} that does one of six tasks, as a tiny model with peaky "
        "random weights, against its own eager attention: logits, entropy, largest weight, "
        "arg-max, distance, top-k, what keys receive, z, head weights, a gain, ZeroTuning and ACT; "
        "plain, padded, with a cache, in `generate`, with a static cache. Made by "
        "`python -m interp_hooks.conformance --json docs/models.json --page docs/models.md` on "
        f"{about.get('date', '?')} (torch {about.get('torch', '?')}, {about.get('machine', '?')}, "
        "CPU); `interp check MODEL` does the same to a model of yours.",
        "",
        "| status | meaning |",
        "|---|---|",
        *(f"| {status} | {meaning} |" for status, meaning in MEANING.items()),
        "",
        *_counts(rows),
    ]
    for kind, title in TITLES.items():
        mine = [row for row in rows if row.kind == kind]
        if mine:
            lines += ["", f"## {title}", "", "| architecture | status | compared | note |"]
            lines += ["|---|---|---|---|"]
            lines += [
                f"| {r.model_type} | {r.status} | {r.compared or ''} | {_note(r)} |"
                for r in sorted(mine, key=lambda r: r.model_type)
            ]
    return "\n".join(lines) + "\n"


def _counts(rows: Sequence[Row]) -> list[str]:
    """The table of counts: kind × status, and the share of equal among those with softmax
    attention that could be built."""
    present = [s for s in MEANING if any(row.status == s for row in rows)]
    lines = [
        "| | " + " | ".join(present) + " | equal, of those with attention that build |",
        "|---|" + "---|" * (len(present) + 1),
    ]
    for kind, title in TITLES.items():
        counts = Counter[str](row.status for row in rows if row.kind == kind)
        tried = sum(n for s, n in counts.items() if s not in ("no attention", "no config"))
        if counts:
            share = f"{counts['equal']} of {tried}"
            share += f" ({counts['equal'] / tried:.0%})" if tried else ""
            cells = " | ".join(str(counts[s] or "") for s in present)
            lines.append(f"| {title} | {cells} | {share} |")
    return lines


def _note(row: Row) -> str:
    """The reason, or which parts of an equal model are refused or could not be compared."""
    parts = [row.reason] if row.reason else []
    if row.refused:
        parts.append(f"refused: {_shortened(row.refused)}")
    if row.unavailable:
        parts.append(f"not compared: {_shortened(row.unavailable)}")
    return "; ".join(parts).replace("|", "\\|").replace("\n", " ")


def _shortened(told: Sequence[str]) -> str:
    """The first of them, and how many more."""
    first = told[0] if len(told[0]) <= 160 else told[0][:159] + "…"
    return first + (f" (and {len(told) - 1} more)" if len(told) > 1 else "")
