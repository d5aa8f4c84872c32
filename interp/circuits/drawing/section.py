"""What the report of a circuit tells first: the task, the graph, the strongest edges, and how it
was judged."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from interp.circuits.drawing.graph import dark, figure
from interp.circuits.judging.agreement import Agreement, evaluate, ranks
from interp.report.heatmap import number
from interp.report.section import Section, plotable
from interp.support.statistics import Interval
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.circuits.judging.faithfulness import Faithfulness
    from interp.circuits.known.truth import Truth
    from interp.results.circuit_table import CircuitTable

#: heads and edges listed
LISTED = 12


def sections(
    circuit: CircuitTable, truth: Truth | None, faithfulness: Faithfulness | None
) -> list[Section]:
    """In the order of the page."""
    found = [_circuit(circuit)]
    if truth is not None:
        found.append(_known(circuit, truth))
    if faithfulness is not None:
        found.append(_faithful(faithfulness))
    return found


def _circuit(circuit: CircuitTable) -> Section:
    search, about = circuit.search, circuit.about(circuit.column)
    passes = [f"{number(search.forwards, 1)} forward"]
    passes += [f"{number(search.backwards, 1)} backward"] if search.backwards else []
    facts = {
        "Task": f"{search.task}, {search.n} pairs",
        "Method": about.title,
        "Accuracy": _interval(search.accuracy),
        f"{search.metric.capitalize()}, clean": _interval(search.clean),
        f"{search.metric.capitalize()}, corrupted": _interval(search.corrupted),
        "Passes over the prompts": ", ".join(passes),
        "Time": f"{number(search.seconds, 1)} s",
    }
    drawn = figure(circuit)
    said = str(drawn.layout.title.subtitle.text)
    content = plotable(drawn)
    strongest = ", ".join(map(str, circuit.heads(5)))
    label = f"Heads by layer, the embedding below and the answer above; the strongest: {strongest}."
    how = (
        "To be read from the bottom up. A head's area is its score, its place from left to right "
        "its number; the "
        "wider a line, the stronger the edge."
        if len(circuit.edges)
        else "Layers from the bottom up. A head's area is its score, its place from left to right "
        "its number."
    )
    html = f"""{_facts(facts)}<p class="reading">{escape(about.reading)}</p>
<figure><div class="scroll"><div class="drawing"><div id="circuit-graph" class="plot" role="img"
 aria-label="{escape(label)}" style="height:{content["layout"]["height"]}px"></div></div></div>
<figcaption>{escape(said[:1].upper() + said[1:])}. {how}</figcaption></figure>
<div class="columns">{_heads(circuit)}{_edges(circuit)}</div>"""
    return Section("circuit", "Circuit", html, {"circuit-graph": content})


def _heads(circuit: CircuitTable) -> str:
    column, effect = circuit.column, f"{circuit.column}_effect"
    table = circuit.frame.sort_values(
        [column, "layer", "head"], ascending=[False, True, True], kind="stable"
    )
    sure, signed = f"{column}_low" in table, effect in table
    rows = []
    for n, row in enumerate(table.head(LISTED).to_dict("records"), 1):
        cells = [str(n), str(Head(row["layer"], row["head"], row["tower"])), number(row[column], 3)]
        cells += (
            [f"[{number(row[f'{column}_low'], 3)}, {number(row[f'{column}_high'], 3)}]"]
            if sure
            else []
        )
        rows.append([*cells, *([f"{row[effect]:+.3g}"] if signed else [])])
    heads = ["#", "Head", "Score", *(["95 %"] if sure else []), *(["Effect"] if signed else [])]
    return _table(heads, rows, f"Strongest of {len(table)} heads")


def _edges(circuit: CircuitTable) -> str:
    table = circuit.edges
    if not len(table):
        return ""
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index[:LISTED]
    rows = [
        [str(n), f"{row.sender} → {row.receiver}", row.kind, number(row.score, 3)]
        for n, row in enumerate(table.loc[order].itertuples(index=False), 1)
    ]
    kinds = any(row[2] for row in rows)
    heads = ["#", "Edge", *(["Into"] if kinds else []), "Weight"]
    rows = rows if kinds else [[*row[:2], row[3]] for row in rows]
    return _table(heads, rows, f"Strongest of {len(table)} edges")


def _known(circuit: CircuitTable, truth: Truth) -> Section:
    """How the ranking agrees with a known circuit, and where its heads are ranked."""
    parts = [f'<p class="reading">{escape(truth.source)}</p>']
    parts += [f'<p class="note">{escape(remark)}</p>' for remark in truth.notes]
    if truth.complete:
        agreement = evaluate(circuit, truth)
        parts.append(_facts(agreement_facts(agreement)))
    places = ranks(circuit, truth)
    rows = [
        [
            f"{places[head]:g}",
            str(head),
            kind,
            number(circuit.value(_here(circuit, head), circuit.column), 3),
        ]
        for head, kind in sorted(truth.heads.items(), key=lambda pair: places[pair[0]])
    ]
    parts.append(
        _table(["Rank", "Head", "Class", "Score"], rows, f"Its heads among {len(circuit.frame)}")
    )
    return Section("known", f"Against the known circuit {truth.name}", "".join(parts), {})


def agreement_facts(agreement: Agreement) -> dict[str, str]:
    """What there is to say of it, by name."""
    at = ", ".join(f"{k}: {value:.2f}" for k, value in agreement.precision.items())
    return {
        "Heads in it": f"{agreement.n_positive} of {agreement.n_heads}",
        "ROC AUC": f"{agreement.auc:.3f} (p = {agreement.p:.2g})",
        "ROC AUC, pessimistic": f"{agreement.auc_pessimistic:.3f}",
        "Average precision": f"{agreement.average_precision:.3f} (chance {agreement.chance:.3f})",
        "Precision at k": at,
    }


def _here(circuit: CircuitTable, head: Head) -> Head:
    """The head with the name of the circuit's tower, which a truth leaves out."""
    return Head(head.layer, head.head, circuit.towers[0])


def _faithful(found: Faithfulness) -> Section:
    facts = {
        "CPR": f"{found.cpr:.3f}",
        "CPR, random heads": "" if found.random_cpr is None else f"{found.random_cpr:.3f}",
        "CMD": f"{found.cmd:.3f}",
        "Heads replaced by": found.mode,
        "Margin, whole model": _interval(found.full),
        "Margin, no heads": _interval(found.empty),
    }
    drawn = found.plot()
    drawn.update_layout(template="none", height=400, meta={"dark": dark()}, margin={"t": 92})
    drawn.update_layout(legend={"x": 0, "xanchor": "left"})  # clear of the buttons
    content = plotable(drawn)
    notes = "".join(f'<p class="note">{escape(remark)}</p>' for remark in found.notes)
    html = f"""{_facts(facts)}{notes}<figure><div class="drawing"><div id="faithfulness-plot" class="plot" role="img"
 aria-label="Faithfulness by the share of heads kept." style="height:{content["layout"]["height"]}px"></div></div>
<figcaption>On held-out prompts: the share of the metric that is there with the strongest heads kept and all others
replaced, and with the strongest replaced.</figcaption></figure>"""
    return Section("faithfulness", "Faithfulness", html, {"faithfulness-plot": content})


def _interval(value: Interval) -> str:
    return str(value)  # three decimals: margins may be small


def _facts(facts: dict[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v
    )
    return f'<dl class="facts plain">{items}</dl>'


def _table(heads: list[str], rows: list[list[str]], caption: str) -> str:
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        '<div class="scroll"><table '
        f'class="top"><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
