"""What lies behind the numbers of a scan: passages of its texts, what heads write, with whom they
compose."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import OutputError
from interp.support.files import check_writable, reason, write_atomic
from interp.support.json_text import parse

#: its file in the folder of a scan
FILE = "evidence.json"


@dataclass(frozen=True)
class Passage:
    """A place in a scan's texts where a head does much: query looks at key.

    Attributes:
        sample, query, key: which text, and the places of both tokens in it.
        weight: the attention weight a.
        moves: a‖v W_O‖, how far it moves the residual stream.
        parts: (text, role) in the order of the text; role "key", "query", "both" or "".
        promotes: the tokens whose logits the head's whole output at the query raises most.
    """

    sample: int
    query: int
    key: int
    weight: float
    moves: float
    parts: tuple[tuple[str, str], ...]
    promotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writes:
    """One direction of a head's OV circuit: what it reads, and what it then writes.

    Attributes:
        share: of ‖W_OV‖² that lies in this direction.
        reads, promotes: tokens along it, the strongest first.
        lowers: tokens against it.
    """

    share: float
    reads: tuple[str, ...]
    promotes: tuple[str, ...]
    lowers: tuple[str, ...]


@dataclass(frozen=True)
class Partner:
    """A head that another composes with.

    Attributes:
        head: its name.
        kind: "q", "k" or "v": what of the later head reads what the earlier one writes.
        earlier: it is the earlier one, whose output is read.
        score: of composition, in [0, 1].
        above_random: the score less that of random matrices.
    """

    head: str
    kind: str
    earlier: bool
    score: float
    above_random: float


@dataclass(frozen=True)
class Built:
    """Who built the score of a head's strongest passage.

    Attributes:
        score: scaling · q·k, before a softcap.
        query, key: (writer, what it adds over all writers of the other side), of the writers of
            either stream that add most, the largest by size first; learned positions are in
            "embedding".
    """

    score: float
    query: tuple[tuple[str, float], ...]
    key: tuple[tuple[str, float], ...]


@dataclass
class HeadEvidence:
    """What is kept of one head."""

    passages: list[Passage] = field(default_factory=list)
    writes: list[Writes] = field(default_factory=list)
    partners: list[Partner] = field(default_factory=list)
    built: Built | None = None


@dataclass
class Evidence:
    """What is kept of each head, by its name, and what a reader must know.

    Attributes:
        heads: name → `HeadEvidence`.
        settings: on how many texts of how many tokens passages were looked for.
        notes: what could not be had, and why.
    """

    heads: dict[str, HeadEvidence]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, head: str) -> HeadEvidence:
        """Of a head; empty where nothing is kept of it."""
        return self.heads.get(head, HeadEvidence())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `evidence.json` into a folder.

        Raises:
            OutputError: it can't be written.
        """
        target = Path(folder)
        check_writable(target)
        text = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))
        write_atomic(target / FILE, text.encode(errors="backslashreplace"))
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evidence:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing or damaged.
        """
        path = Path(folder) / FILE
        try:
            said = parse(path.read_text(encoding="utf-8"))
            heads = {name: _head(one) for name, one in said["heads"].items()}
            return cls(heads, dict(said["settings"]), list(said["notes"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise OutputError(f"{path} can't be read ({why}); run the scan again.") from error


def _head(said: dict[str, Any]) -> HeadEvidence:
    def tuples(one: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {k: tuple(v) if k in names else v for k, v in one.items()}

    passages = [
        Passage(
            **{
                **tuples(p, ["promotes"]),
                "parts": tuple((str(text), str(role)) for text, role in p["parts"]),
            }
        )
        for p in said["passages"]
    ]
    writes = [Writes(**tuples(w, ["reads", "promotes", "lowers"])) for w in said["writes"]]
    built = said.get("built")  # evidence of earlier versions has none
    if built is not None:
        sides = {s: tuple((str(n), float(v)) for n, v in built[s]) for s in ("query", "key")}
        built = Built(float(built["score"]), **sides)
    return HeadEvidence(passages, writes, [Partner(**p) for p in said["partners"]], built)
