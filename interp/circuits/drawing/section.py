"""What the report of a circuit tells first: the task, the graph, the strongest edges, and how it
was judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.circuits.drawing import curve_svg, graph_svg
from interp.circuits.judging.agreement import Agreement, evaluate, ranks
from interp.report.heatmap import number, within
from interp.report.section import Section
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.circuits.judging.curves import Faithfulness
    from interp.circuits.known.truth import Truth
    from interp.results.circuit_table import CircuitTable, Ranked

#: heads and edges listed, and heads that push against the answer
LISTED, NEGATIVE = 12, 4
#: tokens of a long prompt that are shown around what differs
AROUND = 20


def sections(
    circuit: CircuitTable, truth: Truth | None, faithfulness: Faithfulness | None
) -> list[Section]:
    """The circuit, how it agrees with a known one and how faithful it is, as far as these are
    given, in the order of the page."""
    parts = [_circuit(circuit)]
    if circuit.examples:
        parts.append(_prompts(circuit))
    if truth is not None:
        parts.append(_known(circuit, truth))
    if faithfulness is not None:
        parts.append(_faithful(faithfulness))
    return parts


def agreement_facts(agreement: Agreement) -> dict[str, str]:
    """What there is to say of it, by name."""
    at = ", ".join(f"{k}: {value:.2f}" for k, value in agreement.precision.items())
    auc = f"{agreement.auc:.3f} [{agreement.auc_low:.3f}, {agreement.auc_high:.3f}]"
    return {
        f"{agreement.ranked.capitalize()} in it": f"{agreement.n_positive} of {agreement.n_heads}",
        "ROC AUC [95 %]": f"{auc}, p = {agreement.p:.2g}",
        "ROC AUC, pessimistic": f"{agreement.auc_pessimistic:.3f}",
        "Average precision": f"{agreement.average_precision:.3f} (chance {agreement.chance:.3f})",
        "Precision at k": at,
    }


def _circuit(circuit: CircuitTable) -> Section:
    search, about = circuit.search, circuit.about(circuit.column)
    passes = [f"{number(search.forwards, 1)} forward"]
    passes += [f"{number(search.backwards, 1)} backward"] if search.backwards else []
    graph = graph_svg.drawings(circuit)
    strongest = ", ".join(map(str, circuit.heads(5)))
    metric = f"{search.metric.capitalize()} ({search.unit})"
    values = {
        "facts": {
            "Task": f"{search.task}, {search.n} pairs",
            "Method": about.title,
            "Accuracy": str(search.accuracy),
            f"{metric}, clean": str(search.clean),
            f"{metric}, corrupted": str(search.corrupted),
            "Passes over the prompts": ", ".join(passes),
            "Time": f"{number(search.seconds, 1)} s",
            "Against the answer": _negative(circuit),
        },
        "readings": _readings(circuit),
        "graph": graph,
        "label": "Heads by layer, the embedding below and the answer above; the strongest: "
        f"{strongest}.",
        "caption": graph["said"][:1].upper() + graph["said"][1:],
        "heads": _heads(circuit),
        "edges": _edges(circuit) if len(circuit.edges) else None,
    }
    return Section("circuit", "Circuit", "circuit/circuit.html.j2", values)


def _readings(circuit: CircuitTable) -> list[str]:
    """How score and effect are read."""
    effect = f"{circuit.column}_effect"
    said = [f"Score: {circuit.about(circuit.column).reading}"]
    return [
        *said,
        *([f"Effect: {circuit.about(effect).reading}"] if effect in circuit.frame else []),
    ]


def _prompts(circuit: CircuitTable) -> Section:
    """The first prompts, clean and corrupted one under the other."""
    rows = [
        dict(
            clean=marked(e.clean, e.corrupted),
            corrupted=marked(e.corrupted, e.clean),
            answers=" or ".join(t.strip() or t for t in e.answers),
            wrong=" or ".join(t.strip() or t for t in e.wrong),
        )
        for e in circuit.examples
    ]
    values = {"rows": rows, "n": circuit.search.n}
    return Section("prompts", "Prompts", "circuit/prompts.html.j2", values)


def marked(tokens: Sequence[str], other: Sequence[str]) -> list[tuple[str, bool]]:
    """(text, whether it differs) in order; what is far from any difference and from the end is left
    out."""
    different = [i for i, (a, b) in enumerate(zip(tokens, other, strict=True)) if a != b]
    near = [*different, len(tokens) - 1]
    parts: list[tuple[str, bool]] = []
    for i, token in enumerate(tokens):
        if min(abs(i - k) for k in near) > AROUND:
            if not parts or parts[-1][0] != " … ":
                parts.append((" … ", False))
        elif parts and parts[-1][1] == (i in different) and parts[-1][0] != " … ":
            parts[-1] = (parts[-1][0] + token, parts[-1][1])
        else:
            parts.append((token, i in different))
    return parts


def _negative(circuit: CircuitTable) -> str:
    """The heads that push against the right answer most, "L10H7 −0.31, …"; "" without signs."""
    effect = f"{circuit.column}_effect"
    if effect not in circuit.frame:
        return ""
    rows = circuit.frame[circuit.frame[effect] < 0].nsmallest(NEGATIVE, effect)
    return ", ".join(
        f"{Head(r['layer'], r['head'], r['tower'])} −{number(-r[effect])}"
        for r in rows.to_dict("records")
    )


def signed(ranked: Ranked) -> str:
    """A head's effect with its interval, "+0.31 [0.12, 0.5]"; "–" where there is none."""
    return "–" if ranked.effect is None else within(f"{ranked.effect:+.3g}", ranked.effect_ends)


def effect_heading(ranked: Sequence[Ranked]) -> str:
    """The heading of signed effects, with the interval's level where there are intervals; "" where
    no head has an effect."""
    if all(r.effect is None for r in ranked):
        return ""
    return "effect [95 %]" if any(r.effect_ends for r in ranked) else "effect"


def _heads(circuit: CircuitTable) -> dict[str, Any]:
    """The table of the strongest heads."""
    ranked = circuit.ranked(LISTED)
    effect = effect_heading(ranked)
    rows = [
        [str(n), str(r.head), within(number(r.score, 3), r.ends), *([signed(r)] if effect else [])]
        for n, r in enumerate(ranked, 1)
    ]
    headings = ["#", "Head", "Score", *([effect.capitalize()] if effect else [])]
    return _listing(headings, rows, f"Strongest of {len(circuit.frame)} heads")


def _edges(circuit: CircuitTable) -> dict[str, Any]:
    """The table of the strongest edges."""
    table = circuit.edges
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index[:LISTED]
    rows = [
        [str(n), f"{row.sender} → {row.receiver}", row.kind, number(row.score, 3)]
        for n, row in enumerate(table.loc[order].itertuples(index=False), 1)
    ]
    kinds = any(row[2] for row in rows)
    headings = ["#", "Edge", *(["Into"] if kinds else []), "Weight"]
    rows = rows if kinds else [[*row[:2], row[3]] for row in rows]
    return _listing(headings, rows, f"Strongest of {len(table):,} edges")


def _known(circuit: CircuitTable, truth: Truth) -> Section:
    """How the ranking agrees with a known circuit, and where its heads are ranked."""
    places = ranks(circuit, truth)
    tower = circuit.towers[0]  # which a truth leaves out
    rows = [
        [
            f"{places[head]:g}",
            str(head),
            kind,
            number(circuit.value(Head(head.layer, head.head, tower), circuit.column), 3),
        ]
        for head, kind in sorted(truth.heads.items(), key=lambda pair: places[pair[0]])
    ]
    values = {
        "source": truth.source,
        "notes": truth.notes,
        "agreement": agreement_facts(evaluate(circuit, truth)) if truth.complete else None,
        "heads": _listing(
            ["Rank", "Head", "Class", "Score"], rows, f"Its heads among {len(circuit.frame)}"
        ),
    }
    title = f"Against the known circuit {truth.name}"
    return Section("known", title, "circuit/known.html.j2", values)


def _faithful(found: Faithfulness) -> Section:
    random = "" if found.random_cpr is None else f"{found.random_cpr:.3f}"
    values = {
        "facts": {
            "CPR": f"{found.cpr:.3f}",
            f"CPR, random {found.of}": random,
            "CMD": f"{found.cmd:.3f}",
            f"{found.of.capitalize()} replaced by": found.mode,
            "Margin, whole model": str(found.full),
            f"Margin, no {found.of}": str(found.empty),
        },
        "notes": found.notes,
        "of": found.of,
        "curve": curve_svg.drawings(found),
    }
    return Section("faithfulness", "Faithfulness", "circuit/faithfulness.html.j2", values)


def _listing(headings: list[str], rows: list[list[str]], caption: str) -> dict[str, Any]:
    """A table as the template `listing` takes it."""
    return {"headings": headings, "rows": rows, "caption": caption}
