"""The numbers of a circuit: scores of heads, edges between them, and what was asked."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.errors import OutputError
from interp.results.head_table import About, HeadTable
from interp.results.places import Place
from interp.support import typed
from interp.support.checked import path
from interp.support.files import write_atomic
from interp.support.json_text import parse
from interp.support.statistics import Interval
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from typing_extensions import Self

    from interp.results.overlay import PictureOverlay

EDGES, HEAD = "edges.parquet", "circuit.json"
#: what a judge of this circuit writes beside it
JUDGED = ("agreement.json", "faithfulness.parquet", "faithfulness.json")
FORMAT = 1
#: the columns of `Circuit.edges`
EDGE_COLUMNS = ("sender", "receiver", "kind", "score")


#: metric → its unit
UNITS = {"margin": "logits", "probability difference": "of probability", "log-probability": "nats"}


@dataclass(frozen=True)
class Search:
    """What was asked and how the model does it: the task, the method, accuracy and margins (clean
    and corrupted, mean over the prompts with 95 % intervals), what it took, and what the metric is:
    a margin of logits, a probability difference, or a log-probability."""

    task: str
    method: str
    n: int
    accuracy: Interval
    clean: Interval
    corrupted: Interval
    forwards: float
    backwards: float
    seconds: float
    metric: str = "margin"

    @property
    def unit(self) -> str:
        """The metric's unit."""
        return UNITS.get(self.metric, "")


@dataclass(frozen=True)
class Example:
    """One pair of prompts, token by token, and what should follow.

    Attributes:
        clean, corrupted: pieces of text, of one length; those that differ are what the answer hangs
            on.
        answers, wrong: tokens that the clean prompt calls for, and tokens it is held against.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Ranked:
    """A head of a circuit: its score, and the signed effect where the method tells it.

    Attributes:
        ends, effect_ends: 95 % intervals, where there are some. Where that of the effect holds 0,
            it isn't known whether the head matters at all.
    """

    head: Head
    score: float
    ends: tuple[float, float] | None
    effect: float | None
    effect_ends: tuple[float, float] | None


class CircuitTable(HeadTable):
    """Scores of all heads for one task by one method: the column `method` of a table, ≥ 0.

    Beside it may stand `<method>_effect`, the signed effect on the metric, with its standard error
    and 95 % interval (`<method>_effect_stderr`, `_low`, `_high`), and, of a score that is sampled
    otherwise, `<method>_stderr`, `_low` and `_high`.

    Args:
        frame, provenance, notes, about, overlays: as in `HeadTable`.
        search: the record of what was asked.
        edges: sender, receiver ("L0H1", "MLP 2", "input", "output"), kind (q, k, v, or "" for what
            has one input), score; empty where the method gives none.
        artefacts: things to be saved beside the table (a sparse autoencoder), by name.
        effects: (heads, n) effect of each head on each prompt, where the method measures them.
        examples: some of the prompts, as text.

    Example:
        >>> circuit.task, circuit.value("L2H3") >= 0
        ('ioi', True)
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        provenance: Mapping[str, Any],
        search: Search,
        edges: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
        about: Mapping[str, About] | None = None,
        overlays: Sequence[PictureOverlay] = (),
        artefacts: Mapping[str, Any] | None = None,
        effects: np.ndarray | None = None,
        examples: Sequence[Example] = (),
    ):
        super().__init__(frame, provenance, notes, about, overlays)
        self.search = search
        self.edges = (
            pd.DataFrame(columns=list(EDGE_COLUMNS))
            if edges is None
            else edges.reset_index(drop=True)
        )
        self.artefacts = dict(artefacts or {})
        #: (heads, n) effect of each head on each prompt, in the order of `frame`, where the method
        #: measures them
        self.effects = effects
        self.examples = list(examples)

    @property
    def column(self) -> str:
        """The name of the column with the method's scores."""
        return self.search.method

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.search.task

    def heads(self, k: int | None = None) -> list[Head]:
        """The k strongest heads, or all with a score above 0, strongest first.

        Example:
            >>> circuit.heads(2) == circuit.top("head_ablation", 2)
            True
        """
        ranking = self.head_ranking(self.column, k)
        return [head for head, value, _ in ranking if k is not None or value > 0]

    def ranked(self, k: int | None = None) -> list[Ranked]:
        """The k strongest heads, or all, strongest first, with their effects and intervals.

        Example:
            >>> first = circuit.ranked(1)[0]
            >>> first.head == circuit.heads(1)[0], first.effect_ends[0] <= first.effect
            (True, True)
        """
        column = self.column
        by_head = self.frame.set_index(["tower", "layer", "head"])

        def ends(row: pd.Series, name: str) -> tuple[float, float] | None:
            there = f"{name}_low" in row
            return (float(row[f"{name}_low"]), float(row[f"{name}_high"])) if there else None

        ranked = []
        for head, value, _ in self.head_ranking(column, k):
            row = by_head.loc[(head.tower, head.layer, head.head)]
            effect = row.get(f"{column}_effect")
            ranked.append(
                Ranked(
                    head,
                    value,
                    ends(row, column),
                    None if effect is None else float(effect),
                    ends(row, f"{column}_effect"),
                )
            )
        return ranked

    def value(
        self, head: Place | str | Sequence[int], score: str = "", kind: str | None = None
    ) -> float:
        """The score of one head, as `HeadTable.value`; without a score, the method's own.

        Example:
            >>> circuit.value("L2H3") == circuit.value("L2H3", "head_ablation")
            True
        """
        return super().value(head, score or self.column, kind)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `HeadTable.save`'s files, `circuit.json`, `edges.parquet` and the artefacts.

        Each artefact has a folder of its own beside the table.

        Returns:
            The folder.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> interp.circuits.Circuit.load(circuit.save("circuit")).heads(2) == circuit.heads(2)
            True
        """
        target = super().save(folder)
        table = io.BytesIO()
        self.edges.to_parquet(table, index=False)
        head = {
            "format": FORMAT,
            "edges_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
            "search": {
                **{k: v for k, v in vars(self.search).items() if not isinstance(v, Interval)},
                **{k: vars(v) for k, v in vars(self.search).items() if isinstance(v, Interval)},
            },
            "examples": [vars(e) for e in self.examples],
        }
        content = (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        )
        earlier = target / HEAD
        if earlier.is_file() and earlier.read_bytes() != content:
            for name in JUDGED:  # of another circuit
                (target / name).unlink(missing_ok=True)
        write_atomic(target / EDGES, table.getvalue())
        write_atomic(earlier, content)
        for name, artefact in self.artefacts.items():
            artefact.save(target / name)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote, read back (artefacts stay in their folders).

        Raises:
            OutputError: as `HeadTable.load`.
        """
        source = path(folder, "A saved circuit")
        if not (source / HEAD).is_file():
            raise OutputError(
                f"There is no circuit in {source} ({HEAD} is missing); `interp circuit --out "
                f"{source}` makes one."
            )
        atlas = HeadTable.load(folder)
        try:
            head = parse((source / HEAD).read_text(encoding="utf-8"))
            table = (source / EDGES).read_bytes()
            if (
                head["format"] != FORMAT
                or hashlib.sha256(table).hexdigest() != head["edges_sha256"]
            ):
                raise OutputError(
                    f"{source / EDGES} is not the one that {HEAD} describes; find the circuit "
                    "again."
                )
            said: dict[str, Any] = {
                k: typed.made(Interval, v) if isinstance(v, dict) else v
                for k, v in typed.mapping(head["search"]).items()
            }
            edges = pd.read_parquet(io.BytesIO(table))
            return cls(
                atlas.frame,
                atlas.provenance,
                typed.made(Search, said),
                edges,
                atlas.notes,
                atlas._about,
                atlas.overlays,
                examples=[
                    Example(**{k: tuple(map(str, v)) for k, v in e.items()})
                    for e in head.get("examples", [])
                ],
            )
        except FileNotFoundError as error:
            raise OutputError(
                f"There is no circuit in {source} ({Path(error.filename).name} is missing); "
                "`interp circuit --out "
                f"{source}` makes one."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"The circuit in {source} is damaged ({error}); find it again."
            ) from error
