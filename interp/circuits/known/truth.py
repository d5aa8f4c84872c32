"""Circuits that are known: which heads are in them, from papers or planted by hand."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.circuits.known.ends import Edge, check_edge, labels, parse_end
from interp.errors import HeadError, InputError, OutputError, UnknownNameError
from interp.models.names import ALIASES, SHORTCUTS
from interp.support.files import reason, write_atomic
from interp.support.json_text import parse
from interp_hooks.heads import Head, check_head, parse_heads

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

__all__ = ["Edge", "Truth", "published", "published_names"]

FORMAT = 1


@dataclass(frozen=True)
class Truth:
    """A known circuit: head → class ("name mover", …). Heads not named are not in it.

    Args:
        name: of the circuit, "ioi".
        n_layers, n_heads: the model's size.
        heads: head → class.
        model: which model.
        source: the paper or repository that the list is from.
        effects: a number a head where one was published (retrieval scores), else empty.
        edges: (sender, receiver, part) where known (constructed circuits): a head, "input",
            "MLP 3" or "output", and "q", "k" or "v" of a receiving head, else "".
        notes: what a reader must know.
        complete: False where only the strongest heads are listed; then heads not named may be in it
            too, and neither ROC nor recall means anything.
        constant_edges: edges that the circuit reads, but that carry the same in every prompt (where
            a token stands): to remove one breaks the circuit, to compare prompts never shows it.
        complete_edges: True where every edge that is not in `edges` or `constant_edges` carries
            nothing for the task, so that an edge AUC means something.

    Raises:
        HeadError: a head that a model of this size doesn't have.
        InputError: no layers or heads, a head with a tower's name, an edge into something else.

    Example:
        >>> truth = interp.circuits.published("ioi", "gpt2")
        >>> truth.n_layers, truth.classes()["name mover"]
        (12, [L9H9, L10H0, L9H6])
    """

    name: str
    heads: dict[Head, str]
    n_layers: int
    n_heads: int
    source: str
    model: str = ""
    effects: dict[Head, float] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True
    constant_edges: tuple[Edge, ...] = ()
    complete_edges: bool = False

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.n_heads < 1:
            raise InputError(
                f"The circuit {self.name} has {self.n_layers} layers × {self.n_heads} heads; use 1 "
                "× 1 up."
            )
        edges = (*self.edges, *self.constant_edges)
        ends = [end for edge in edges for end in edge[:2] if isinstance(end, Head)]
        for head in (*self.heads, *self.effects, *ends):
            if head.tower:
                raise InputError(
                    f"The circuit {self.name} is of one tower; write {Head(head.layer, head.head)}."
                )
            check_head(head, self.n_layers, self.n_heads, f"The circuit {self.name}")
        for edge in edges:
            check_edge(edge, self.n_layers, f"The circuit {self.name}")

    def __repr__(self) -> str:
        part = "" if self.complete else ", only the strongest"
        where = f" in {self.model}" if self.model else ""
        return (
            f"Truth({self.name}{where}: {len(self.heads)} of {self.n_layers * self.n_heads} "
            f"heads{part})"
        )

    def classes(self) -> dict[str, list[Head]]:
        """The heads of each class, in the order given.

        Example:
            >>> sorted(interp.circuits.published("ioi", "gpt2").classes())[:2]
            ['S-inhibition', 'backup name mover']
        """
        by_class: dict[str, list[Head]] = {}
        for head, kind in self.heads.items():
            by_class.setdefault(kind, []).append(head)
        return by_class

    def matrix(self) -> np.ndarray:
        """(n_layers, n_heads) bool: which heads are in the circuit.

        Example:
            >>> int(interp.circuits.published("ioi", "gpt2").matrix().sum())
            26
        """
        inside = np.zeros((self.n_layers, self.n_heads), dtype=bool)
        for head in self.heads:
            inside[head.layer, head.head] = True
        return inside

    def edge_labels(self, table: pd.DataFrame) -> np.ndarray:
        """(rows,) for an edge AUC: 1 for edges of the circuit, 0 for others, NaN for constant ones.

        Args:
            table: all edges of a found circuit (`circuit.edges`): sender, receiver, kind.

        Raises:
            InputError: the truth doesn't list all edges, or the table lacks some of them.

        Example:
            >>> made = interp.circuits.constructed.get("frac_prevs")
            >>> found = interp.circuits.find(made.model, made.task, "eap", n=4)
            >>> int((made.truth.edge_labels(found.edges) == 1).sum())
            9
        """
        if not self.complete_edges:
            raise InputError(
                f"The circuit {self.name} doesn't list all its edges, so an edge AUC is not "
                "defined; constructed circuits do (interp.circuits.constructed)."
            )
        return labels(table, self.edges, self.constant_edges, f"the circuit {self.name}")

    def check_model(self, model: HookedModel) -> None:
        """Refuses a model of another size.

        Raises:
            InputError: the circuit is of a model of another size.
        """
        if (model.n_layers, model.n_heads) != (self.n_layers, self.n_heads):
            raise InputError(
                f"The circuit {self.name} is of {self.n_layers} layers × {self.n_heads} heads and "
                f"{model.name} has {model.n_layers} × {model.n_heads}; compare the same model."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file; returns its path.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> truth = interp.circuits.published("ioi", "gpt2")
            >>> interp.circuits.Truth.load(truth.save("ioi.json")) == truth
            True
        """
        content = dict(
            format=FORMAT,
            name=self.name,
            model=self.model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            source=self.source,
            complete=self.complete,
            heads={str(h): kind for h, kind in self.heads.items()},
            effects={str(h): value for h, value in self.effects.items()},
            edges=[[str(a), str(b), part] for a, b, part in self.edges],
            notes=list(self.notes),
            constant_edges=[[str(a), str(b), part] for a, b, part in self.constant_edges],
            complete_edges=self.complete_edges,
        )
        target = Path(path)
        write_atomic(
            target,
            (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(
                errors="backslashreplace"
            ),
        )
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Truth:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing, damaged or of another format.
        """
        source = Path(path)
        try:
            content = parse(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise OutputError(f"Can't read the circuit {source} ({reason(error)}).") from error
        except ValueError as error:
            raise OutputError(f"{source} is damaged ({error}); save the circuit again.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OutputError(f"{source} is not a circuit of format {FORMAT}; save it again.")
        try:
            return cls(
                name=_text(content["name"]),
                heads={Head.parse(h): _text(kind) for h, kind in content["heads"].items()},
                n_layers=_whole(content["n_layers"]),
                n_heads=_whole(content["n_heads"]),
                source=_text(content["source"]),
                model=_text(content["model"]),
                effects={Head.parse(h): float(value) for h, value in content["effects"].items()},
                edges=_edges(content["edges"]),
                notes=tuple(_text(note) for note in content["notes"]),
                complete=_flag(content["complete"]),
                constant_edges=_edges(content.get("constant_edges", [])),
                complete_edges=_flag(content.get("complete_edges", False)),
            )
        except (KeyError, TypeError, AttributeError, ValueError, HeadError) as error:
            raise OutputError(
                f"The circuit in {source} is damaged ({error}); save it again."
            ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _edges(rows: Any) -> tuple[Edge, ...]:
    return tuple((parse_end(a), parse_end(b), _text(part)) for a, b, part in rows)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


# --- published circuits
# -----------------------------------------------------------------------------------------------


def _listed(**classes: str) -> dict[Head, str]:
    """ "name_mover"="9.9,10.0" → {L9H9: "name mover", …}; S-inhibition has its hyphen back."""
    by_head = {
        h: kind.replace("_", " ") for kind, heads in classes.items() for h in parse_heads(heads)
    }
    return {h: kind.replace("S inhibition", "S-inhibition") for h, kind in by_head.items()}


def _ioi() -> Truth:
    heads = _listed(
        name_mover="9.9,10.0,9.6",
        backup_name_mover="10.10,10.6,10.2,10.1,11.2,9.7,9.0,11.9",
        negative_name_mover="10.7,11.10",
        S_inhibition="7.3,7.9,8.6,8.10",
        induction="5.5,5.8,5.9,6.9",
        duplicate_token="0.1,0.10,3.0",
        previous_token="2.2,4.11",
    )
    source = (
        "Wang et al. 2022, arXiv 2211.00593; as coded in "
        "ArthurConmy/Automatic-Circuit-Discovery, acdc/ioi/utils.py"
    )
    return Truth("ioi", heads, 12, 12, source, "gpt2")


def _greater_than() -> Truth:
    source = (
        "Hanna et al. 2023; as coded in ArthurConmy/Automatic-Circuit-Discovery, "
        "acdc/greaterthan/utils.py"
    )
    notes = ("The circuit has MLPs too, 0 to 3 and 8 to 11.",)
    heads = _listed(circuit="0.1,0.3,0.5,5.5,6.1,6.9,7.10,8.11,9.1")
    return Truth("greater_than", heads, 12, 12, source, "gpt2", notes=notes)


_DOCSTRING = (
    "Two lists are in use, which differ in one head: auto-circuit's edge circuit is 0.5, 1.2, 1.4, "
    "2.0, 3.0, 3.6; the "
    "list that sae-circuits scores against has 1.0 in place of 1.2."
)


def _docstring() -> Truth:
    notes = (
        _DOCSTRING,
        "The node version of auto-circuit adds 0.2 and 0.4, and 1.0, 0.1, 2.3 as extras.",
    )
    source = "UFO-101/auto-circuit, docstring_official.py (edge circuit)"
    return Truth(
        "docstring",
        _listed(circuit="0.5,1.2,1.4,2.0,3.0,3.6"),
        4,
        8,
        source,
        "attn-only-4l",
        notes=notes,
    )


def _docstring_sae_circuits() -> Truth:
    source = "charlieoneill11/sae-circuits; O'Neill & Bui 2024, arXiv 2405.12522"
    heads = _listed(circuit="0.5,1.0,1.4,2.0,3.0,3.6")
    return Truth("docstring_sae_circuits", heads, 4, 8, source, "attn-only-4l", notes=(_DOCSTRING,))


def _induction() -> Truth:
    source = "ARENA, intro to mechanistic interpretability (a comment in the solutions)"
    return Truth("induction", _listed(induction="5.1,5.5,6.9,7.2,7.10"), 12, 12, source, "gpt2")


#: model → (layers, heads, heads with a score ≥ 0.1, mean retrieval score of the strongest)
_RETRIEVAL: Mapping[str, tuple[int, int, int, Mapping[str, float]]] = {
    "llama-2-7b-80k": (
        32,
        32,
        33,
        {"16.19": 0.94, "11.15": 0.92, "8.26": 0.80, "6.9": 0.62, "7.12": 0.61},
    ),
    "mistral-7b-v0.2": (32, 32, 43, {"18.0": 0.94, "12.7": 0.93, "12.6": 0.77}),
    "qwen1.5-14b": (40, 40, 61, {"12.2": 1.00, "14.12": 1.00, "23.16": 0.92}),
    "llama-2-13b-64k": (40, 40, 33, {"13.23": 0.90, "9.33": 0.87}),
    "yi-6b-200k": (32, 32, 53, {"17.2": 0.78, "14.9": 0.76}),
}


def _retrieval(model: str) -> Truth:
    layers, heads, strong, scores = _RETRIEVAL[model]
    effects = {Head.parse(h): value for h, value in scores.items()}
    note = (
        f"Only the strongest are listed; {strong} of {layers * heads} heads have a retrieval "
        "score of 0.1 or more."
    )
    source = "Wu et al. 2024, arXiv 2404.15574; nightdessert/Retrieval_Head, head_score"
    listed = dict.fromkeys(effects, "retrieval")
    return Truth(
        "retrieval", listed, layers, heads, source, model, effects, notes=(note,), complete=False
    )


_PUBLISHED = {
    ("ioi", "gpt2"): _ioi,
    ("greater_than", "gpt2"): _greater_than,
    ("induction", "gpt2"): _induction,
    ("docstring", "attn-only-4l"): _docstring,
    ("docstring_sae_circuits", "attn-only-4l"): _docstring_sae_circuits,
}


#: circuits of bundled models, TASK.json in a folder named as the model; made by
#: `examples/circuit_table.py`
BUNDLED = Path(__file__).parent / "truths"


def published_names() -> list[tuple[str, str]]:
    """(task, model) of every circuit known here.

    Published ones, and those measured in the bundled models.

    Example:
        >>> ("ioi", "gpt2") in interp.circuits.published_names()
        True
    """
    bundled = [(path.stem, path.parent.name) for path in sorted(BUNDLED.glob("*/*.json"))]
    return [*_PUBLISHED, *(("retrieval", model) for model in _RETRIEVAL), *bundled]


def published(task: str, model: Any = None) -> Truth:
    """The published circuit of a task; of a bundled model, the one measured in it.

    Args:
        task: its name.
        model: which model's, by name or the model itself; None for "gpt2", or for the only model
            there is.

    Raises:
        UnknownNameError: no such task, or none for this model.

    Example:
        >>> len(interp.circuits.published("ioi", "gpt2").heads)
        26
    """
    model = getattr(model, "name", model)
    tasks = list(dict.fromkeys(t for t, _ in published_names()))
    if task not in tasks:
        raise UnknownNameError(
            f"There is no published circuit called {task!r}; {_hint(task, tasks)}"
        )
    models = [m for t, m in published_names() if t == task]
    if model is None:
        papers = [m for m in models if not (BUNDLED / m).is_dir()] or models
        if "gpt2" not in papers and len(papers) > 1:
            raise UnknownNameError(
                f"The circuit {task} was published for several models: {', '.join(papers)}; say "
                "which."
            )
        model = "gpt2" if "gpt2" in papers else papers[0]
    if model not in models:
        raise UnknownNameError(
            f"There is no published circuit {task} of {model!r}; {_hint(model, models)}"
        )
    if (task, model) in _PUBLISHED:
        return _PUBLISHED[task, model]()
    return (
        _retrieval(model) if task == "retrieval" else Truth.load(BUNDLED / model / f"{task}.json")
    )


def published_for(task: str, name: str) -> Truth:
    """The known circuit of a task in the model that `interp.load` takes by this name: a hub id, an
    alias, a shortcut, or the last part of any.

    Raises `InputError` where none is known.
    """
    full = [name, SHORTCUTS.get(name, ("",))[0], ALIASES.get(name.lower(), "")]
    names = [part for n in full if n for part in (n, n.lower(), n.rpartition("/")[2].lower())]
    names += [alias for alias, target in ALIASES.items() if target in full]
    there = published_names()
    for model in names:
        if (task, model) in there:
            return published(task, model)
    models = [m for t, m in there if t == task]
    others = (
        f"one is for {', '.join(models)}"
        if models
        else f"there are {', '.join(f'{t} ({m})' for t, m in there)}"
    )
    raise InputError(
        f"No circuit of {task} is known for {name}; {others}. Give a file instead (--compare "
        "FILE), or leave the comparison out."
    )


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."
