"""What a compressed cache keeps, what it costs, and what the same memory costs otherwise."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.edits import files as edit_files
from interp.edits.gate import Gate
from interp.errors import OutputError
from interp.results.interchange.duo import Duo
from interp.results.interchange.entries import Entries
from interp.results.interchange.reading import TABLE
from interp.support.checked import path as checked_path
from interp.support.files import check_writable, write_atomic
from interp.support.html import block
from interp.support.json_text import parse

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
HEAD, EDIT = "compression.json", "gate.json"


@dataclass(frozen=True)
class Compression:
    """A gate for `HeadCache`, and what it does beside other ways to hold as much.

    Attributes:
        gate: which kv heads keep everything, and what the others hold.
        frame: a row a cache: `cache`, `memory` (share of the whole cache's bytes, measured after a
            text), and of `needles` and `loss` the mean, `_low`, `_high`, and the paired change
            from the whole cache, `_change`, `_change_low`, `_change_high`.
        provenance: model, weights, settings, versions, date.
        notes: what a reader must know.

    Example:
        >>> import pandas as pd
        >>> gate = interp.edits.Gate(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), sink=4, recent=12)
        >>> table = pd.DataFrame([{"cache": "whole", "memory": 1.0}])
        >>> kept = interp.caches.Compression(gate, table)
        >>> interp.caches.Compression.load(kept.save("half")).phrase
        '1 of 4 kv heads keep everything, the others 4 first and 12 recent tokens'
    """

    gate: Gate
    frame: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes DuoAttention's table of gates with its `config.json`, the gate as an edit
        (`gate.json`), and `compression.json`; returns the folder.

        Raises:
            OutputError: it can't be written.
        """
        target = Path(folder)
        check_writable(target)
        alpha = self.alpha
        layers, heads = alpha.shape
        values = {(i, h): float(alpha[i, h]) for i in range(layers) for h in range(heads)}
        entries = Entries("duo", Duo.score, values, grain="kv_head", complete=True)
        sizes = dict(sink_size=self.gate.sink, recent_size=self.gate.recent)
        write_atomic(target / TABLE, Duo().write(entries).encode())
        write_atomic(target / "config.json", (json.dumps(sizes) + "\n").encode())
        edit_files.save(target / EDIT, [self.gate])
        content = dict(
            format=FORMAT,
            rows=json.loads(self.frame.to_json(orient="records")),
            notes=list(self.notes),
            provenance=self.provenance,
        )
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomic(target / HEAD, text.encode(errors="backslashreplace"))
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Compression:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing or damaged.
        """
        import pandas as pd

        source = checked_path(folder, "A saved compression")
        try:
            content = parse((source / HEAD).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            frame = pd.DataFrame(content["rows"])
            notes, record = tuple(content["notes"]), content["provenance"]
        except OSError as error:
            raise OutputError(f"There is no compression in {source}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{source / HEAD} is damaged ({error}); compress again.") from error
        return cls(Gate(source), frame, record, notes)

    @property
    def alpha(self) -> torch.Tensor:
        """(layers, kv_heads): 1 where a kv head keeps everything."""
        alpha = self.gate.alpha
        assert isinstance(alpha, torch.Tensor)
        return alpha

    @property
    def phrase(self) -> str:
        """Which kv heads keep everything, in a sentence."""
        full, n = int((self.alpha == 1).sum()), self.alpha.numel()
        return (
            f"{full} of {n} kv heads keep everything, the others {self.gate.sink} first and "
            f"{self.gate.recent} recent tokens"
        )

    def rows(self) -> list[list[str]]:
        """The table as text: cache, memory, needles, change, loss, change."""
        return [
            [
                str(row["cache"]),
                f"{row['memory']:.2f}",
                f"{row['needles']:.2f}",
                _interval(row, "needles_change", 2),
                f"{row['loss']:.2f}",
                _interval(row, "loss_change", 3),
            ]
            for row in self.frame.to_dict("records")
        ]

    def _repr_html_(self) -> str:
        return block(
            str(self.provenance.get("model") or "Compression"),
            self.phrase,
            headings=["cache", "memory", "needles", "change", "loss", "change"],
            rows=self.rows(),
            notes=["95 % intervals in brackets.", *self.notes],
        )


def _interval(row: dict[Any, Any], name: str, digits: int) -> str:
    if row[name] is None or row[name] != row[name]:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
