"""Which forwards a scan makes: how many, how long, and whether attention is measured in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from interp.scores.catalogue import select
from interp.scores.score import ModelScore
from interp.tasks.formats import ORDER
from interp.tasks.posing import TRIALS

#: tokens of the problems that formats are tried on, of a repeated text, of a pair of domains, of
#: a needle's answer
TRIAL, REPEATED, DOMAIN, ANSWER = 256, 101, 256, 5
#: texts that evidence is gathered from, tokens of each, and how many forwards' worth each takes
TEXTS, LENGTH, TIMES = 4, 384, 6

#: what evidence is called among the passes
EVIDENCE = "evidence"


class Pass(NamedTuple):
    """Forwards alike: `rows` of them over `tokens` each, then so many decode `steps` over a cache;
    `watched` where attention is measured; `unit` where workers can share them out."""

    what: str
    rows: int
    tokens: int
    steps: int = 0
    watched: bool = True
    unit: bool = True


def passes_of(scores: str | list[str], context: int, samples: int) -> tuple[list[Pass], list[str]]:
    """The forwards of a scan of a text model, and notes of what is not counted.

    Args:
        scores: as `interp.scan_heads` takes them.
        context, samples: of the scan.
    """
    chosen = [s for s in select(scores) if not s.needs_images]
    own = [s.name for s in chosen if isinstance(s, ModelScore)]
    probes = {s.probe for s in chosen if not isinstance(s, ModelScore)}
    found = [p for probe in sorted(probes) for p in _of_probe(probe, context, samples)]
    if probes & {"needle", "question", "answer"}:
        rows, tokens = TRIALS * (len(ORDER) - 1), min(TRIAL, context)
        found.append(Pass("formats tried", rows, tokens, watched=False, unit=False))
    length = min(LENGTH, context)
    found.append(Pass(EVIDENCE, TIMES * min(TEXTS, samples), length, watched=False))
    notes = [f"Not counted: {', '.join(own)}, which run the model in a way of their own."]
    return found, notes if own else []


def _of_probe(probe: str, context: int, samples: int) -> Iterator[Pass]:
    if probe == "text":
        yield Pass("running text", samples, context)
    elif probe == "repeat":
        yield Pass("repeated random tokens", samples, REPEATED, unit=False)
    elif probe == "domains":
        yield Pass("prose against code", 2 * samples, min(DOMAIN, context))
    elif probe in ("needle", "answer", "question"):
        yield from _needles(probe, context, samples)


def _needles(probe: str, context: int, samples: int) -> Iterator[Pass]:
    """A quarter, a half and the whole of the context, in turn."""
    lengths = sorted({max(96, context // 4), max(96, context // 2), context})
    counts = [len(range(i, samples, len(lengths))) for i in range(len(lengths))]
    for length, count in zip(lengths, counts, strict=True):
        if not count:
            continue
        if probe == "needle":  # the prompt is read unwatched, its answer's steps are watched
            yield Pass("needles", count, length, ANSWER, watched=False)
        else:
            rows = 2 * count if probe == "question" else count
            yield Pass(f"needles, {probe}", rows, length)
