"""How far an atlas agrees with another one, or with a score file, on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.report.heatmap import number
from interp.report.section import Section
from interp.results.change import Move

if TYPE_CHECKING:
    import pandas as pd

    from interp.results.head_table import HeadTable

HEADINGS = ["Score", "Spearman", "p of ρ", "Kendall", "Heads", "Strongest in both", "By chance"]
HEADINGS += ["p of overlap", ""]


def of(
    compared: pd.DataFrame,
    one: HeadTable,
    other: HeadTable,
    moves: Sequence[Move] = (),
    called: tuple[str, str] | None = None,
) -> Section:
    """The section of what `interp.compare` gave for `one`, whose page it is, and `other`, and of
    the heads that moved most; `called`: what the two are called."""
    first, second = called or (one.model, other.model)
    rows = [cells(row) for row in compared.to_dict("records")]
    table = dict(
        headings=HEADINGS,
        rows=rows,
        caption="Rank correlations with 95 % intervals",
    )
    file = other.provenance.get("interchange")
    values = dict(
        table=table,
        sides=[
            ("First", first, one.shape_text(), measured(one), one.notes),
            (
                "Second",
                file["file"] if isinstance(file, dict) else second,
                other.shape_text(),
                measured(other),
                other.notes,
            ),
        ],
        inputs=compared.attrs.get("inputs", ""),
        differently=differently(one.provenance, other.provenance),
        moved=dict(
            headings=["Head", "Score", "First", "Second", "Change", "In standard errors"],
            rows=[moved(m) for m in moves],
            caption="Moved most, in shares of the score's range: second − first",
        ),
    )
    return Section("comparison", "Agreement", "comparison.html.j2", values)


def measured(table: HeadTable) -> str:
    """How a scan was measured, "context 1024, 16 samples, seed 0"; without what is not known."""
    settings = table.provenance.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    parts = [f"context {settings['context']}"] if settings.get("context") is not None else []
    parts += [f"{settings['samples']} samples"] if settings.get("samples") is not None else []
    seed = table.provenance.get("seed")
    return ", ".join([*parts, *([f"seed {seed}"] if seed is not None else [])])


def differently(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two scans were measured otherwise, "context 1024, then 256; seed 0, then 7"."""

    def said(record: Mapping[str, Any]) -> dict[str, Any]:
        settings = record.get("settings")
        settings = dict(settings) if isinstance(settings, Mapping) else {}
        settings.pop("scores", None)
        return {**settings, **{k: record[k] for k in ("seed", "dtype", "device") if k in record}}

    first, second = said(one), said(other)
    names = [n for n in first if n in second and first[n] != second[n]]
    return "; ".join(f"{n} {first[n]}, then {second[n]}" for n in names)


def moved(move: Move) -> list[str]:
    """One change as text."""
    sign = "+" if move.change > 0 else "−"
    return [
        move.head,
        move.score,
        number(move.before),
        number(move.after),
        f"{sign}{number(abs(move.change))}",
        "–" if move.z is None else f"{abs(move.z):.1f}",
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text: a number with its interval, "–" where it is not defined."""
    overlap = next(v for name, v in row.items() if name.startswith("top"))
    k = row["k"]
    return [
        str(row["score"]),
        ranged(row["spearman"], row["spearman_low"], row["spearman_high"]),
        chance(row["spearman_p"]),
        ranged(row["kendall"], row["kendall_low"], row["kendall_high"]),
        str(row["heads"]),
        f"{share(overlap, row['overlap_low'], row['overlap_high'])} of {k}",
        share(row["overlap_expected"]),
        chance(row["overlap_p"]),
        "; ".join(p for p in (str(row["remark"]), _over(row)) if p),
    ]


def _over(row: dict[str, Any]) -> str:
    return "intervals over samples" if row["interval_over"] == "samples" else ""


def ranged(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "0.91 [0.86, 0.95]"; no brackets without an interval."""
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def share(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """ "70% [40%, 90%]"; no brackets without an interval."""
    if value is None:
        return "–"
    return f"{value:.0%}" + ("" if low is None else f" [{low:.0%}, {high:.0%}]")


def chance(p: float | None) -> str:
    """A p-value; "–" where there is none."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
