"""Every score of every head, where it came from, and how each is read: what is saved and loaded.

A table is self-describing: saved, it carries how each score is read, so that it can be shown and
reported on where neither the model nor the package that defines a score is at hand.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.errors import HeadError, InputError, UnknownNameError
from interp.results import head_table_files
from interp.results.about import About as About
from interp.results.by_head import ByHead
from interp.results.frame import KEYS, checked, is_companion
from interp.results.measured import Measured
from interp.results.overlay import PictureOverlay
from interp.results.places import KVHead, Layer, Place, column, parse, place, places
from interp.support.checked import path, whole_number
from interp.support.jsonable import jsonable
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from typing_extensions import Self


class HeadTable(ByHead):
    """Scores of all heads of a model.

    `table["induction"]` is a score's (layers, heads), `table["L5H1"]` a head's scores; a loop gives
    the heads, `len` their number, and `in` tells of scores and heads.

    Args:
        frame: a row a head: `tower`, `kind`, `layer`, `head`, `kv_head`, then a float column a
            score, and `<score>_stderr` (and `_low`, `_high`, a 95 % interval) where it was sampled.
            NaN: not measured.
        provenance: where it comes from (`model`, `revision`, `weights_hash`, `versions`, `seed`,
            `inputs_hash`, `settings`, `created`, `hardware`, `seconds`, `measured`: score → the
            `tokens` of its inputs and its `samples`); anything that JSON can hold.
        notes: sentences that belong beside the numbers, "retrieval: task not solved (accuracy
            0.10)".
        about: how to read each score; an `Atlas` looks up those left out in
            `interp.scores`.
        overlays: where some heads look in a picture (`interp.results.overlay.Overlay`).

    Raises:
        InputError: a column is missing, not numeric, or a head is there twice.

    Example:
        >>> HeadTable(atlas.frame, {"model": "mine"}).top("previous_token", 2)
        [L0H0, L0H2]
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        provenance: Mapping[str, Any],
        notes: Sequence[str] = (),
        about: Mapping[str, About] | None = None,
        overlays: Sequence[PictureOverlay] = (),
    ):
        self.frame = checked(frame)
        self.provenance: dict[str, Any] = dict(provenance)
        self.notes: list[str] = list(notes)
        self._about: dict[str, About] = dict(about or {})
        self.overlays: list[PictureOverlay] = list(overlays)
        #: score → (layer, head or key/value head) → its number in each sample, where a file held
        #: them
        self.samples: dict[str, dict[tuple[int, int], tuple[float, ...]]] = {}

    @property
    def model(self) -> str:
        """The model's full name."""
        return str(self.provenance.get("model") or "unnamed model")

    @property
    def scores(self) -> list[str]:
        """Names of the scores, in the order they were measured."""
        columns = list(self.frame.columns)
        return [c for c in columns if c not in KEYS and not is_companion(c, columns)]

    @property
    def towers(self) -> list[str]:
        """Names of the towers, [""] where the model has only one."""
        return [str(t) for t in self.frame["tower"].unique()]

    def about(self, score: str) -> About:
        """The title, formula, unit and citation of a score, as an `About`.

        Example:
            >>> atlas.about("previous_token").title
            'Previous token'
        """
        self._check(score)
        if score not in self._about:
            self._about[score] = self.look_up(score)
        return self._about[score]

    def look_up(self, score: str) -> About:
        """What is known of a score that came without a word on how to read it: its name."""
        return About(title=score.replace("_", " ").capitalize())

    def panels(self, score: str) -> list[tuple[str, str]]:
        """The (tower, kind) pairs in which a score was measured for a head; all pairs if in none.

        Example:
            >>> atlas.panels("previous_token")
            [('', 'self')]
        """
        self._check(score)
        pairs = list(dict.fromkeys(zip(self.frame["tower"], self.frame["kind"], strict=True)))
        measured = self.frame[np.isfinite(self.frame[score])]
        panels = set(zip(measured["tower"], measured["kind"], strict=True))
        return [p for p in pairs if p in panels] or pairs

    def matrix(self, score: str, tower: str = "", kind: str | None = None) -> np.ma.MaskedArray:
        """(layers, heads) of a score in one tower, masked where not measured.

        A layer's or key/value head's value stands once a head of it.

        Args:
            score: its name; `atlas[score]` is the same.
            tower: "" for the only tower in which the score was measured.
            kind: None for self-attention where there is any.

        Raises:
            UnknownNameError: a score that is not there.
            InputError: a tower or kind that is not there.

        Example:
            >>> atlas.matrix("previous_token").shape
            (4, 8)
        """
        self._check(score)
        return self.cells(score, *self.panel(score, tower, kind))

    def stderr(
        self, score: str, tower: str = "", kind: str | None = None
    ) -> np.ma.MaskedArray | None:
        """Standard errors of `matrix(score)` over samples; None where the score is not sampled.

        Example:
            >>> atlas.stderr("previous_token").shape
            (4, 8)
        """
        self._check(score)
        column = f"{score}_stderr"
        return self.cells(column, *self.panel(score, tower, kind)) if column in self.frame else None

    def top(
        self, score: str, k: int = 10, tower: str | None = None, kind: str | None = None
    ) -> list[Place]:
        """The k strongest places of a score, strongest first; ties by layer, then head.

        A score's `about(score).grain` says what they are: heads, `KVHead`s or `Layer`s. `heads_at`
        gives the query heads of one.

        Args:
            score: its name.
            k: how many.
            tower: None for all.
            kind: None for self-attention where there is any.

        Raises:
            UnknownNameError: a score that is not there.
            InputError: a negative k, or a tower or kind that is not there.

        Example:
            >>> len(atlas.top("previous_token", 3))
            3
        """
        return [found for found, _, _ in self.ranking(score, k, tower, kind)]

    def ranking(
        self, score: str, k: int | None = None, tower: str | None = None, kind: str | None = None
    ) -> list[tuple[Place, float, float | None]]:
        """(head, value, standard error) by score, strongest first; no error where not sampled.

        A score of key/value heads or of layers has `KVHead`s or `Layer`s in place of heads, each
        once.

        Args:
            score: its name.
            k: how many; None for all.
            tower, kind: as in `top`.

        Example:
            >>> head, value, error = atlas.ranking("previous_token", 1)[0]
            >>> head in atlas.top("previous_token", 1), bool(value == atlas["previous_token"].max())
            (True, True)
        """
        k = None if k is None else whole_number(k, "k, the number of heads,")
        if k is not None and k < 0:
            raise InputError(f"The number of top heads can't be negative, and {k} was asked for.")
        grain = self.about(score).grain
        rows = places(self.frame, score, grain)
        if tower is not None:
            rows = rows[rows["tower"] == self.panel(score, tower, kind)[0]]
        # A head's name does not say its kind, so a list of heads is of one kind.
        kinds = set(rows["kind"])
        panel_kind = (
            kind if kind is not None else "self" if "self" in kinds or not kinds else min(kinds)
        )
        rows = rows[rows["kind"] == panel_kind]
        rows = rows.sort_values(
            [score, "tower", "layer", "head"], ascending=[False, True, True, True], kind="stable"
        )
        rows = rows if k is None else rows.head(k)
        companion = f"{score}_stderr"
        errors = rows[companion] if companion in rows else [math.nan] * len(rows)
        index = rows[column(grain) or "head"]
        return [
            (
                place(grain, int(layer), int(within), str(where)),
                float(value),
                float(error) if math.isfinite(error) else None,
            )
            for where, layer, within, value, error in zip(
                rows["tower"], rows["layer"], index, rows[score], errors, strict=True
            )
        ]

    def head_ranking(
        self, score: str, k: int | None = None, tower: str | None = None, kind: str | None = None
    ) -> list[tuple[Head, float, float | None]]:
        """As `ranking`, with the query heads of each place: what edits and ablations take.

        Args:
            score: its name.
            k: how many places; None for all.
            tower, kind: as in `top`.

        Example:
            >>> atlas.head_ranking("previous_token") == atlas.ranking("previous_token")
            True
        """
        return [
            (head, value, error)
            for found, value, error in self.ranking(score, k, tower, kind)
            for head in ([found] if isinstance(found, Head) else self.heads_at(found))
        ]

    def heads_at(self, written: Place | str) -> list[Head]:
        """The query heads of a place: a head's own, a key/value head's group, all of a layer.

        Raises:
            HeadError: a place that is not there.
            InputError: a table of key/value heads that was read without their model.

        Example:
            >>> atlas.heads_at("L0KV1")
            [L0H2, L0H3]
        """
        target = parse(written)
        self._check_query_heads(target)
        rows = self._rows(target, target.tower)
        heads = dict.fromkeys(zip(rows["layer"], rows["head"], strict=True))
        return [Head(int(layer), int(head), target.tower) for layer, head in heads]

    def value(
        self, head: Place | str | Sequence[int], score: str, kind: str | None = None
    ) -> float:
        """The score of one head, key/value head or layer; NaN where not measured.

        Args:
            head: in any spelling.
            score: its name.
            kind: None for self-attention where there is any.

        Raises:
            HeadError: a head that is not there.

        Example:
            >>> bool(atlas.value("L0H2", "previous_token") == atlas["previous_token"][0, 2])
            True
        """
        self._check(score)
        target = parse(head)
        if isinstance(target, Head):
            self._check_query_heads(target)
        rows = self._rows(target, *self.panel(score, target.tower, kind))
        if not isinstance(target, Head) and self.about(score).grain == "head" and len(rows) > 1:
            raise InputError(f"{score} is a score of heads; {target} has {len(rows)} of them.")
        return float(rows[score].iloc[0])

    @property
    def query_heads_known(self) -> bool:
        """Whether its rows are query heads: not so in a file of key/value heads that was read
        without their model, where each key/value head has one row."""
        said = self.provenance.get("interchange")
        return not (isinstance(said, Mapping) and said.get("query_heads") == "unknown")

    def _check_query_heads(self, target: Place) -> None:
        if not self.query_heads_known and not isinstance(target, Layer):
            raise InputError(
                f"Which query heads read a key/value head of {self.model} is not known; read the "
                "file with model=."
            )

    def _rows(self, target: Place, tower: str, kind: str | None = None) -> pd.DataFrame:
        """The rows of a place's heads. Raises `HeadError` where there is none."""
        rows = self.frame[(self.frame["tower"] == tower) & (self.frame["layer"] == target.layer)]
        if kind is not None:
            rows = rows[rows["kind"] == kind]
        if isinstance(target, Head):
            rows = rows[rows["head"] == target.head]
        elif isinstance(target, KVHead):
            rows = rows[rows["kv_head"] == target.kv_head]
        if rows.empty:
            what = "head " if isinstance(target, Head) else ""
            raise HeadError(
                f"There is no {what}{target} in this atlas of {self.model} ({self.shape_text()})."
            )
        return rows

    def above(self, score: str) -> int | None:
        """How many heads (key/value heads, layers: by the score's grain) reach its threshold; None
        without one, or if nothing was measured.

        Example:
            >>> atlas.above("previous_token")
            2
        """
        about = self.about(score)
        values = places(self.frame, score, about.grain)[score].to_numpy()
        return (
            None
            if about.threshold is None or not values.size
            else int((values >= about.threshold).sum())
        )

    def measured(self, score: str) -> Measured:
        """On how many tokens and samples a score was measured.

        Example:
            >>> str(atlas.measured("previous_token"))
            '101 tokens, 2 samples'
        """
        self._check(score)
        return Measured.of(self.provenance, score)

    def shape_text(self) -> str:
        """The size as "12 layers × 12 heads", for each tower where there are several.

        Example:
            >>> atlas.shape_text()
            '4 layers × 8 heads'
        """
        parts = []
        for (tower, kind), rows in self.frame.groupby(["tower", "kind"], sort=False):
            name = " ".join(n for n in (str(tower), "cross" if kind == "cross" else "") if n)
            layers, heads = rows["layer"].max() + 1, rows["head"].max() + 1
            what = "heads" if self.query_heads_known else "key/value heads"
            parts.append(f"{name + ': ' if name else ''}{layers} layers × {heads} {what}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"Atlas({self.model}: {self.shape_text()}; {', '.join(self.scores) or 'no scores'})"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `atlas.parquet` and `atlas.json` into a folder (made if need be).

        Returns:
            The folder.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> interp.Atlas.load(atlas.save("scan")).frame.equals(atlas.frame)
            True
        """
        said = {
            "provenance": jsonable(self.provenance),
            "notes": self.notes,
            "scores": {s: jsonable(asdict(self.about(s))) for s in self.scores},
            "overlays": [o.to_json() for o in self.overlays],
        }
        return head_table_files.save(path(folder, "The folder to save in"), self.frame, said)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing, damaged or of another format.

        Example:
            >>> interp.Atlas.load(atlas.save("scan")).scores
            ['previous_token']
        """
        return cls(*head_table_files.load(path(folder, "A saved scan")))

    def _check(self, score: str) -> None:
        if score in self.scores:
            return
        near = difflib.get_close_matches(str(score), self.scores, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"it has: {', '.join(self.scores) or 'none'}."
        )
        raise UnknownNameError(f"This atlas of {self.model} has no score called {score!r}; {hint}")

    def panel(self, score: str, tower: str, kind: str | None) -> tuple[str, str]:
        """The (tower, kind) that is meant, see `matrix`."""
        panels = self.panels(score)
        if not tower and "" not in self.towers:
            towers = list(dict.fromkeys(t for t, _ in panels))
            if not np.isfinite(
                self.frame[score]
            ).any():  # measured nowhere, so the main tower will do
                towers = ["text"] if "text" in towers else towers[:1]
            if len(towers) > 1:
                raise InputError(
                    f"{score} was measured in the towers {' and '.join(towers)}; say which with "
                    "tower=."
                )
            tower = towers[0]
        if tower not in self.towers:
            names = ", ".join(t or '""' for t in self.towers)
            raise InputError(f"This atlas of {self.model} has no tower {tower!r}; it has {names}.")
        kinds = list(dict.fromkeys(self.frame.loc[self.frame["tower"] == tower, "kind"]))
        if kind is None:
            measured = [k for t, k in panels if t == tower] or kinds
            kind = "self" if "self" in measured else measured[0]
        if kind not in kinds:
            raise InputError(
                f"{self.model} has no {kind!r} attention in tower {tower!r}; it has "
                f"{' and '.join(kinds)}."
            )
        return tower, kind

    def cells(self, name: str, tower: str, kind: str, grain: str = "head") -> np.ma.MaskedArray:
        """(layers, heads) of a column in one tower and kind, masked where not measured; of another
        grain (layers, key/value heads), or (layers, 1)."""
        rows = self.frame[(self.frame["tower"] == tower) & (self.frame["kind"] == kind)]
        within = column(grain)
        index = rows[within].to_numpy() if within else np.zeros(len(rows), dtype=int)
        values = np.full((int(rows["layer"].max()) + 1, int(index.max()) + 1), np.nan)
        values[rows["layer"].to_numpy(), index] = rows[name].to_numpy()
        return np.ma.masked_invalid(values)
