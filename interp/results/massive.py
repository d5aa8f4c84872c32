"""Massive activations as a table: where the residual stream is thousands of times its median."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import OutputError
from interp.support import typed as checked
from interp.support.files import check_writable, reason, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp.support.jsonable import jsonable

ROWS, HEAD = "massive.parquet", "massive.json"
#: rows that a notebook shows
SHOWN = 20
COLUMNS = {
    "sample": "int64",
    "layer": "int64",
    "position": "int64",
    "token_id": "int64",
    "token": "str",
    "dimension": "int64",
    "value": "float64",
    "ratio": "float64",
}


@dataclass(frozen=True)
class MassiveActivations:
    """Every massive activation of some texts.

    Attributes:
        frame: a row an activation: `sample`, `layer` (the stream as it enters it; one more than the
            last is what leaves that), `position` and `token_id`, `token`, `dimension`, its `value`,
            and `ratio`, |value| over the median of |x| in that layer of the sample.
        provenance: where it comes from, with the thresholds `least` and `ratio` among its settings.

    Example:
        >>> table = interp.massive_activations(model, context=32, samples=1, least=3, ratio=10)
        >>> list(table.frame.columns[:4])
        ['sample', 'layer', 'position', 'token_id']
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any]

    @property
    def rule(self) -> str:
        """What counts: "|x| > 100 and > 1,000 × the layer's median"."""
        settings = self.provenance["settings"]
        return f"|x| > {settings['least']:,g} and > {settings['ratio']:,g} × the layer's median"

    def summary(self) -> pd.DataFrame:
        """A row a dimension, position and token: the `layers` they are massive in, in how many
        `samples`, and the largest `value` with its `layer` and `ratio`; the largest first.

        Example:
            >>> table = interp.massive_activations(model, context=32, samples=1, least=3, ratio=10)
            >>> table.summary().columns.tolist()[:3]
            ['dimension', 'position', 'token']
        """
        rows = []
        for (dimension, position, token), some in self.frame.groupby(
            ["dimension", "position", "token"], sort=False
        ):
            top = some.loc[some["value"].abs().idxmax()]
            rows.append(
                {
                    "dimension": dimension,
                    "position": position,
                    "token": token,
                    "layers": _ranges(sorted(set(some["layer"]))),
                    "samples": some["sample"].nunique(),
                    "value": top["value"],
                    "layer": top["layer"],
                    "ratio": top["ratio"],
                }
            )
        columns = "dimension position token layers samples value layer ratio".split()
        table = pd.DataFrame(rows, columns=columns)
        order = table["value"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def __repr__(self) -> str:
        dimensions = sorted(set(self.frame["dimension"].tolist()))
        return f"MassiveActivations({len(self.frame)} in dimensions {dimensions}; {self.rule})"

    def _repr_html_(self) -> str:
        rows = [
            [
                r.dimension,
                r.position,
                repr(r.token),
                r.layers,
                r.samples,
                f"{r.value:,.0f}",
                f"{r.ratio:,.0f} ×",
            ]
            for r in self.summary().head(SHOWN).itertuples(index=False)
        ]
        headings = ["dimension", "position", "token", "layers", "samples", "largest", "of median"]
        many = f"{len(self.frame):,} where {self.rule}"
        return block("Massive activations", many, {}, headings, rows)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `massive.parquet` and `massive.json` into a folder (made if need be).

        Raises:
            OutputError: it can't be written.

        Example:
            >>> table = interp.massive_activations(model, context=32, samples=1, least=3, ratio=10)
            >>> type(table).load(table.save("scan")).frame.equals(table.frame)
            True
        """
        target = Path(folder)
        check_writable(target)
        numbers = io.BytesIO()
        self.frame.to_parquet(numbers, index=False)
        head = {
            "frame_sha256": hashlib.sha256(numbers.getvalue()).hexdigest(),
            "provenance": jsonable(dict(self.provenance)),
        }
        write_atomic(target / ROWS, numbers.getvalue())
        text = json.dumps(head, indent=2, ensure_ascii=False) + "\n"
        write_atomic(target / HEAD, text.encode(errors="backslashreplace"))
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MassiveActivations:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing or damaged.

        Example:
            >>> table = interp.massive_activations(model, context=32, samples=1, least=3, ratio=10)
            >>> type(table).load(table.save("scan")).rule == table.rule
            True
        """
        source = Path(folder)
        try:
            head = parse((source / HEAD).read_text(encoding="utf-8"))
            numbers = (source / ROWS).read_bytes()
            if hashlib.sha256(numbers).hexdigest() != head["frame_sha256"]:
                raise ValueError(f"{ROWS} is another one")
            frame = pd.read_parquet(io.BytesIO(numbers))
            table = cls(typed(frame), checked.mapping(head["provenance"]))
            _ = table.rule  # it says what the rows are, and needs both its numbers
            return table
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise OutputError(
                f"The massive activations in {source} can't be read ({why}); run the scan again."
            ) from error


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its columns in order, of their types."""
    return frame[list(COLUMNS)].astype(COLUMNS)


def _ranges(numbers: list[int]) -> str:
    """ "3–10, 12" of whole numbers in order."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
