"""What commands print under --json: one document on stdout, for scripts; all else on stderr."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.circuits.circuit import Circuit
    from interp.circuits.known.truth import Truth
    from interp.evaluation.ablation import Ablation

#: places of a score that are listed
TOP = 10


def emit(document: Any) -> None:
    """Print one JSON document: dataclasses as objects, heads as "L5H1", what is not a number as
    null."""
    from interp.support.jsonable import jsonable

    typer.echo(json.dumps(jsonable(_plain(document)), ensure_ascii=False))


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, at any depth; places as they are written."""
    from interp.results.places import Place

    if isinstance(value, Place):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in vars(value).items() if not hasattr(v, "to_parquet")}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def records(frame: Any) -> list[dict[str, Any]]:
    """A row an object."""
    return list(frame.to_dict("records"))


def ranked(atlas: Atlas, score: str, top: int, tower: str | None = None) -> list[dict[str, Any]]:
    """The strongest places of a score: head, value, standard error."""
    ranking = atlas.ranking(score, top, tower)
    return [
        {"head": str(place), "value": value, "stderr": error} for place, value, error in ranking
    ]


def atlas(found: Atlas, **more: Any) -> dict[str, Any]:
    """An atlas: its model and notes, and of each score how it is read and its strongest heads."""
    scores = []
    for score in found.scores:
        about = asdict(found.about(score))
        said = {k: about[k] for k in ("title", "unit", "threshold", "grain")}
        scores.append(
            {"score": score, **said, "above": found.above(score), "top": ranked(found, score, TOP)}
        )
    massive = None if found.massive is None else records(found.massive.summary())
    return {
        "model": found.model,
        "shape": found.shape_text(),
        **more,
        "scores": scores,
        "massive": massive,
        "notes": found.notes,
        "provenance": found.provenance,
    }


def ablation(model: str, mode: str, result: Ablation) -> dict[str, Any]:
    """An ablation: intervals of the untouched model, the ablated one and the control."""
    names = ("task", "heads", "control_heads", "baseline", "ablated", "difference", "control")
    said = {name: getattr(result, name) for name in (*names, "control_difference", "notes")}
    return {"model": model, "mode": mode, **said}


def circuit(found: Circuit, top: int, truth: Truth | None, **more: Any) -> dict[str, Any]:
    """A circuit: what was asked, its strongest heads and edges, and what judges said."""
    heads = []
    for r in found.ranked(top):
        low, high = r.ends or (None, None)
        least, most = r.effect_ends or (None, None)
        heads.append({
            "head": str(r.head), "score": r.score, "low": low, "high": high,
            "effect": r.effect, "effect_low": least, "effect_high": most,
            **({} if truth is None else {"known": truth.heads.get(r.head)}),
        })  # fmt: skip
    return {
        "model": found.model,
        "search": found.search,
        "heads": heads,
        "edges": records(found.edges),
        **more,
        "notes": found.notes,
    }
