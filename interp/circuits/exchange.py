"""Circuits in the files of others: the JSON graphs of EAP-IG and MIB (`Graph.to_json`,
`importances.json`), written and read.

Such a file has a node for the input, each head ("a0.h1"), each MLP ("m0") and the logits, and an
edge for each pair of which one reads the other ("input->a0.h1<q>"), with scores and whether they
are in the graph. Only JSON: their `.pt` files are pickles, which this toolkit does not open.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.circuits.graph_shape import GraphShape
from interp.errors import InputError, OutputError
from interp.results.circuit_table import EDGE_COLUMNS
from interp.support.checked import path as checked_path
from interp.support.files import check_writable, reason, write_atomic
from interp.support.json_text import parse

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit

#: what scores in a file are of: the loss −m, as MIB's own script has it, or the metric m itself
SIGNS = {"loss": 1.0, "metric": -1.0}


@dataclass(frozen=True)
class Graph:
    """What a graph file says, in this toolkit's names; judges take it as they take a `Circuit`.

    Attributes:
        frame: a row a head, `tower`, `kind`, `layer`, `head`, `kv_head`, `graph` (how strongly it
            takes part: its strongest outgoing edge by size, or its own score's size), `effect`
            (signed: the sum of its outgoing edges, or its own score) and `in_graph`.
        edges: `sender`, `receiver`, `kind`, `score`, strongest first, as `Circuit.edges`; and
            `in_graph`.
        config: the file's `cfg`: n_layers, n_heads, parallel_attn_mlp, d_model.

    Example:
        >>> circuit = interp.circuits.find(model, "ioi", "eap", n=4)
        >>> graph = interp.circuits.read_graph(interp.circuits.write_graph(circuit, "graph.json"))
        >>> graph.column, len(graph.frame), list(graph.edges)[:2]
        ('graph', 32, ['sender', 'receiver'])
    """

    frame: pd.DataFrame
    edges: pd.DataFrame
    config: dict[str, Any]

    @property
    def column(self) -> str:
        """The column of the heads' scores."""
        return "graph"


def write_graph(
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    k: int | None = None,
    sign: str = "loss",
    d_model: int | None = None,
    parallel: bool | None = None,
) -> Path:
    """Writes a circuit as a JSON graph of EAP-IG and MIB.

    Edges keep their scores; a method without edges gives scores of nodes: its signed effects, or
    its scores where it has none. A key-value head that several query heads share is one receiver
    here and one for each query head there (`ungroup_grouped_query_attention`): its score is shared
    out equally, so that the sum stays. That is a choice: the file's users see no query head of a
    group preferred.

    Args:
        circuit: a found `Circuit`.
        path: the file.
        k: how many of the strongest edges (or heads), by size, are in the graph; None for all that
            are scored.
        sign: "loss": above 0 speaks for the right answer, as here and as MIB's script writes it
            (its difference is corrupted − clean, and its metric the negated one); "metric": the
            reverse, as EAP-IG gives for the metric itself.
        d_model, parallel: the width of the stream, and whether MLPs read beside the attention (as
            in GPT-NeoX), where the circuit's record does not have them.

    Returns:
        Its path.

    Raises:
        InputError: a bad `k` or `sign`, layers without attention or of different numbers of heads,
            no d_model or `parallel`.
        OutputError: it can't be written.

    Misleads:
        MIB ranks by signed scores for CPR and by size for CMD: a method whose scores are unsigned
        (discrete_sae) has no edge or head that hurts, so the two can't differ.

    Example:
        >>> circuit = interp.circuits.find(model, "ioi", "eap", n=4)
        >>> interp.circuits.write_graph(circuit, "graph.json", k=20).name
        'graph.json'
    """
    target = checked_path(path, "A graph file")
    factor = _factor(sign)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise InputError(f"k counts the edges or heads in the graph, from 1, not {k!r}.")
    shape = GraphShape.of(circuit, d_model, parallel)
    scores, chosen = _scored(circuit, shape, k)
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    nodes |= {n: {"in_graph": False} for n in shape.writers()}
    edges = {name: {"score": 0.0, "in_graph": False} for name in shape.edges()}
    for name, score in scores.items():
        place = edges[name] if "->" in name else nodes[name]
        place["score"], place["in_graph"] = factor * score, name in chosen
        if "->" in name and name in chosen:
            nodes[name.partition("->")[0]]["in_graph"] = True
    nodes["logits"] = {"in_graph": True}
    said = dict(cfg=shape.config(), nodes=nodes, edges=edges)
    check_writable(target.parent)
    write_atomic(target, json.dumps(said).encode())
    return target


def read_graph(
    path: str | os.PathLike[str], *, kv_heads: int | None = None, sign: str = "loss"
) -> Graph:
    """Reads a JSON graph of EAP-IG and MIB.

    Edges that score 0 and are not in the graph are left out: the file lists all that there can be.

    Args:
        path: the file.
        kv_heads: key-value heads of a layer, so that their edges, which the file has for each query
            head, are put together (summed) as here; None leaves them as they are.
        sign: what its scores are of, as in `write_graph`.

    Returns:
        A `Graph`.

    Raises:
        OutputError: it can't be read.
        InputError: it is no such graph (a pickle, neuron-level alone), names what a model of its
            size has not, or a score is no number.

    Example:
        >>> circuit = interp.circuits.find(model, "ioi", "eap", n=4)
        >>> path = interp.circuits.write_graph(circuit, "graph.json")
        >>> graph = interp.circuits.read_graph(path, kv_heads=model.n_kv_heads)
        >>> interp.circuits.evaluate(graph, ["L2H3", "L3H1"]).auc >= 0
        True
    """
    source = checked_path(path, "A graph file")
    factor = _factor(sign)
    said = _content(source)
    shape = GraphShape.read(source, said["cfg"], kv_heads)
    nodes = {name: _entry(source, name, one) for name, one in said["nodes"].items()}
    edges = {name: _entry(source, name, one) for name, one in said["edges"].items()}
    allowed, writers = set(shape.edges()), {"input", "logits", *shape.writers()}
    strange = next((n for n in [*nodes, *edges] if n not in (allowed if "->" in n else writers)),
                   None)  # fmt: skip
    if strange is not None:
        raise InputError(
            f"{source} has {strange[:60]!r}, which a model of {shape.layers} layers × "
            f"{shape.heads} heads has not."
        )
    table = _edge_table(shape, edges, factor)
    return Graph(_head_table(source, shape, nodes, edges, factor), table, dict(said["cfg"]))


def _factor(sign: str) -> float:
    if sign not in SIGNS:
        raise InputError(f"sign of a graph's scores is {' or '.join(SIGNS)}, not {sign!r}.")
    return SIGNS[sign]


# --- scores --------------------------------------------------------------------------------------


def _scored(
    circuit: Circuit, shape: GraphShape, k: int | None
) -> tuple[dict[str, float], set[str]]:
    """name → score of their edges, or of their nodes where there are no edges, and those in it."""
    scores: dict[str, float] = {}
    chosen: set[str] = set()
    if len(circuit.edges):
        for rank, row in enumerate(circuit.edges.itertuples()):  # strongest first
            names = shape.theirs(str(row.sender), str(row.receiver), str(row.kind))
            scores.update(dict.fromkeys(names, float(row.score) / len(names)))
            chosen.update(names if k is None or rank < k else ())
        return scores, chosen
    column, frame = circuit.column, circuit.frame
    signed = f"{column}_effect"
    values = frame[signed if signed in frame else column]
    for layer, head, value in zip(frame["layer"], frame["head"], values, strict=True):
        scores[f"a{layer}.h{head}"] = float(value)
    chosen = {f"a{h.layer}.h{h.head}" for h in circuit.heads(k)}
    return scores, chosen


def _edge_table(
    shape: GraphShape, edges: Mapping[str, tuple[float | None, bool]], factor: float
) -> pd.DataFrame:
    total: dict[tuple[str, str, str], float] = {}
    inside: dict[tuple[str, str, str], bool] = {}
    for name, (score, taken) in edges.items():
        key = shape.ours(name)
        total[key] = total.get(key, 0.0) + factor * (score or 0.0)
        inside[key] = inside.get(key, False) or taken
    kept = [key for key in total if total[key] or inside[key]]
    kept.sort(key=lambda key: -abs(total[key]))
    rows = [(*key, total[key], inside[key]) for key in kept]
    frame = pd.DataFrame(rows, columns=[*EDGE_COLUMNS, "in_graph"])
    return frame.astype({"score": "float32", "in_graph": bool})


def _head_table(
    source: Path,
    shape: GraphShape,
    nodes: Mapping[str, tuple[float | None, bool]],
    edges: Mapping[str, tuple[float | None, bool]],
    factor: float,
) -> pd.DataFrame:
    """A row a head. Raises `InputError` where neither nodes nor edges are scored."""
    table = _edge_table(shape, edges, factor)
    out = {name: some["score"] for name, some in table.groupby("sender")}
    own = {name: score for name, (score, _) in nodes.items() if score is not None}
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    by_node = any(f"a{layer}.h{head}" in own for layer, head in heads)
    if not by_node and not len(table):
        raise InputError(f"{source} has no score of a head or an edge, so there is no circuit.")
    rows = []
    for layer, head in heads:
        name = f"a{layer}.h{head}"
        if by_node and name not in own:
            raise InputError(f"{source} scores some heads and not {name}; score all, or none.")
        values: Sequence[float] = [factor * own[name]] if by_node else out.get(
            f"L{layer}H{head}", pd.Series(dtype=float)
        ).tolist()  # fmt: skip
        rows.append(
            dict(
                tower="",
                kind="self",
                layer=layer,
                head=head,
                kv_head=head // (shape.groups or 1),
                graph=max((abs(v) for v in values), default=0.0),
                effect=float(sum(values)),
                in_graph=nodes.get(name, (None, False))[1],
            )
        )
    return pd.DataFrame(rows)


# --- files ---------------------------------------------------------------------------------------


def _content(source: Path) -> dict[str, Any]:
    if source.suffix in (".pt", ".pth", ".pkl"):
        raise InputError(
            f"{source} is a pickle, which this toolkit does not open; save the graph as JSON "
            "(Graph.to_json) there."
        )
    try:
        said = parse(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{source} can't be read ({reason(error)}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not whole JSON ({error}).") from error
    parts = ("cfg", "nodes", "edges")
    if not isinstance(said, dict) or not all(isinstance(said.get(p), dict) for p in parts):
        raise InputError(
            f"{source} is no graph of EAP-IG or MIB: it has not the parts {', '.join(parts)}."
        )
    return said


def _entry(source: Path, name: str, said: Any) -> tuple[float | None, bool]:
    """(score, in the graph) of a node or an edge; a node's score may be missing or NaN, which is
    "not scored" there."""
    if isinstance(said, bool):  # the older form of nodes
        return None, said
    inside = said.get("in_graph") if isinstance(said, Mapping) else None
    if not isinstance(inside, bool):
        raise InputError(f"{source} does not say whether {name[:60]!r} is in the graph.")
    score = said.get("score")
    if "->" not in name and (score is None or (isinstance(score, float) and math.isnan(score))):
        return None, inside
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(f"{source} has no finite score for {name[:60]!r}.")
    return float(score), inside
