"""Every score of every head, where it came from, and how each is read: what is saved and loaded.

A table is self-describing: saved, it carries how each score is read, so that it can be shown and
reported on where neither the model nor the package that defines a score is at hand.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.errors import HeadError, InputError, OutputError, UnknownNameError
from interp.results.overlay import Overlay
from interp.support.files import check_writable, reason, write_atomic
from interp.support.jsonable import jsonable
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from typing_extensions import Self

    from interp_hooks.call import Site

FORMAT = 1
KEYS = ("tower", "kind", "layer", "head", "kv_head")
_PLACE = ["tower", "kind", "layer", "head"]


@dataclass(frozen=True)
class About:
    """How a score is read: what `interp.scores.Score` says of it, as jsonable data."""

    title: str
    reading: str = ""
    formula: str = ""
    citation: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    threshold: float | None = None


class HeadTable:
    """Scores of all heads of a model.

    Args:
        frame: a row a head: `tower`, `kind`, `layer`, `head`, `kv_head`, then a float column a
            score, and `<score>_stderr` (and `_low`, `_high`, a 95 % interval) where it was sampled.
            NaN: not measured.
        provenance: where it comes from (`model`, `revision`, `weights_hash`, `versions`, `seed`,
            `inputs_hash`, `settings`, `created`, `hardware`, `seconds`); anything that JSON can
            hold.
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
        overlays: Sequence[Overlay] = (),
    ):
        self.frame = _checked(frame)
        self.provenance: dict[str, Any] = dict(provenance)
        self.notes: list[str] = list(notes)
        self._about: dict[str, About] = dict(about or {})
        self.overlays: list[Overlay] = list(overlays)

    @property
    def model(self) -> str:
        """The model's full name."""
        return str(self.provenance.get("model") or "unnamed model")

    @property
    def scores(self) -> list[str]:
        """Names of the scores, in the order they were measured."""
        columns = list(self.frame.columns)
        return [c for c in columns if c not in KEYS and not _is_companion(c, columns)]

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

    def __getitem__(self, score: str) -> np.ma.MaskedArray:
        """(layers, heads), masked where not measured. Models of several towers: `matrix(score,
        tower=...)`."""
        return self.matrix(score)

    def matrix(self, score: str, tower: str = "", kind: str | None = None) -> np.ma.MaskedArray:
        """(layers, heads) of a score in one tower, masked where not measured.

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
    ) -> list[Head]:
        """The k heads with the highest score, strongest first; ties by layer, then head.

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
        return [head for head, _, _ in self.ranking(score, k, tower, kind)]

    def ranking(
        self, score: str, k: int | None = None, tower: str | None = None, kind: str | None = None
    ) -> list[tuple[Head, float, float | None]]:
        """(head, value, standard error) by score, strongest first; no error where not sampled.

        Args:
            score: its name.
            k: how many; None for all heads.
            tower, kind: as in `top`.

        Example:
            >>> head, value, error = atlas.ranking("previous_token", 1)[0]
            >>> head in atlas.top("previous_token", 1), bool(value == atlas["previous_token"].max())
            (True, True)
        """
        self._check(score)
        if k is not None and k < 0:
            raise InputError(f"The number of top heads can't be negative, and {k} was asked for.")
        rows = self.frame[np.isfinite(self.frame[score])]
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
        errors = (
            rows[f"{score}_stderr"]
            if f"{score}_stderr" in rows
            else pd.Series(np.nan, index=rows.index)
        )
        return [
            (
                Head(int(layer), int(head), str(where)),
                float(value),
                float(error) if math.isfinite(error) else None,
            )
            for where, layer, head, value, error in zip(
                rows["tower"], rows["layer"], rows["head"], rows[score], errors, strict=True
            )
        ]

    def value(self, head: Head | str | Sequence[int], score: str, kind: str | None = None) -> float:
        """The score of one head; NaN where not measured.

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
        target = Head.parse(head)
        tower, kind = self.panel(score, target.tower, kind)
        place = (
            self.frame[["tower", "kind", "layer", "head"]]
            .eq([tower, kind, target.layer, target.head])
            .all(axis=1)
        )
        if not place.any():
            raise HeadError(
                f"There is no head {target} in this atlas of {self.model} ({self.shape_text()})."
            )
        return float(self.frame.loc[place, score].iloc[0])

    def above(self, score: str) -> int | None:
        """How many heads reach the score's threshold; None without one, or if nothing was measured.

        Example:
            >>> atlas.above("previous_token")
            2
        """
        threshold = self.about(score).threshold
        values = self.frame[score].to_numpy()
        values = values[np.isfinite(values)]
        return None if threshold is None or not values.size else int((values >= threshold).sum())

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
            parts.append(f"{name + ': ' if name else ''}{layers} layers × {heads} heads")
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
        target = Path(folder)
        check_writable(target)
        table = io.BytesIO()
        self.frame.to_parquet(table, index=False)
        head = {
            "format": FORMAT,
            "frame_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
            "provenance": jsonable(self.provenance),
            "notes": self.notes,
            "scores": {s: jsonable(asdict(self.about(s))) for s in self.scores},
            "overlays": [o.to_json() for o in self.overlays],
        }
        write_atomic(target / "atlas.parquet", table.getvalue())
        write_atomic(
            target / "atlas.json", (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode()
        )
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing, damaged or of another format.

        Example:
            >>> interp.Atlas.load(atlas.save("scan")).scores
            ['previous_token']
        """
        source = Path(folder)
        raw = _read(source / "atlas.json", source)
        try:
            head = json.loads(raw)
        except ValueError as error:
            raise OutputError(
                f"{source / 'atlas.json'} is damaged ({error}); run the scan again."
            ) from error
        version = head.get("format") if isinstance(head, dict) else None
        if version != FORMAT:
            raise OutputError(
                f"{source} holds an atlas of format {version!r} and this version reads format "
                f"{FORMAT}; run the scan "
                "again, or read it with the version of interp that wrote it."
            )
        table = _read(source / "atlas.parquet", source)
        if hashlib.sha256(table).hexdigest() != head.get("frame_sha256"):
            raise OutputError(
                f"{source / 'atlas.parquet'} is not the one that atlas.json describes (damaged, or "
                "a save was "
                "interrupted); run the scan again."
            )
        try:
            names = {f.name for f in fields(About)}
            about = {
                s: About(**{k: v for k, v in a.items() if k in names})
                for s, a in head["scores"].items()
            }
            overlays = [Overlay.from_json(o) for o in head.get("overlays", [])]
            return cls(
                pd.read_parquet(io.BytesIO(table)),
                head["provenance"],
                head["notes"],
                about,
                overlays,
            )
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise OutputError(
                f"The atlas in {source} is damaged ({error}); run the scan again."
            ) from error

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

    def cells(self, column: str, tower: str, kind: str) -> np.ma.MaskedArray:
        """(layers, heads) of a column in one tower and kind, masked where not measured."""
        rows = self.frame[(self.frame["tower"] == tower) & (self.frame["kind"] == kind)]
        values = np.full((int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1), np.nan)
        values[rows["layer"].to_numpy(), rows["head"].to_numpy()] = rows[column].to_numpy()
        return np.ma.masked_invalid(values)


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise OutputError(
            f"There is no atlas in {folder} ({path.name} is missing); `interp scan-heads --out "
            f"{folder}` makes one."
        ) from error
    except OSError as error:
        raise OutputError(f"Can't read {path} ({reason(error)}).") from error


def rows_of(sites: Iterable[Site]) -> pd.DataFrame:
    """A row a head of these attentions, with the columns that a frame begins with."""
    rows = [(s.tower, s.kind, s.layer, h, s.kv_head(h)) for s in sites for h in range(s.n_heads)]
    return pd.DataFrame(rows, columns=list(KEYS))


def _is_companion(column: str, columns: Sequence[str]) -> bool:
    """Whether a column says how sure another one is."""
    score, _, part = column.rpartition("_")
    return part in ("stderr", "low", "high") and score in columns


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in the fixed column order and types, or `InputError`."""
    missing = [k for k in KEYS if k not in frame.columns]
    if missing:
        raise InputError(f"The frame of an atlas lacks the columns {', '.join(missing)}.")
    if frame.empty:
        raise InputError("The frame of an atlas has no rows: no head was scanned.")
    scores = [c for c in frame.columns if c not in KEYS]
    out = frame[[*KEYS, *scores]].reset_index(drop=True).copy()
    try:
        out = out.astype(
            {
                "layer": "int64",
                "head": "int64",
                "kv_head": "int64",
                **dict.fromkeys(scores, "float64"),
            }
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The frame of an atlas must hold whole layers and heads, and numbers: {error}."
        ) from error
    out = out.astype({"tower": "str", "kind": "str"})
    if (out[["layer", "head"]] < 0).any(axis=None):
        raise InputError("Layers and heads of an atlas count from 0; the frame has negative ones.")
    twice = out.duplicated(_PLACE)
    if twice.any():
        row = out[twice].iloc[0]
        raise InputError(
            f"Head {Head(row['layer'], row['head'], row['tower'])} is twice in the frame of the "
            "atlas."
        )
    return out
