"""What a calibration gives back, and how it is saved."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.calibration.splits import Outcome
from interp.errors import EditError, OutputError
from interp.support.checked import path as checked_path
from interp.support.files import reason, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp.support.statistics import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.edit import Edit


FORMAT = 1
#: the tables of a calibration, each in a file of its own
TABLES = ("trials", "trace")


@dataclass(frozen=True)
class Change:
    """A mean untouched and edited, and their paired difference."""

    baseline: Interval
    edited: Interval
    difference: Interval

    @classmethod
    def of(cls, before: Any, after: Any, seed: int) -> Change:
        return cls(bootstrap(before, seed), bootstrap(after, seed), bootstrap(after - before, seed))

    @classmethod
    def read(cls, content: dict[str, Any]) -> Change:
        return cls(
            **{name: Interval(**content[name]) for name in ("baseline", "edited", "difference")}
        )


@dataclass(frozen=True)
class Comparison:
    """Untouched against edited on one split: `accuracy`, `margin`, next-token `entropy`."""

    accuracy: Change
    margin: Change
    entropy: Change

    @classmethod
    def of(cls, before: Outcome, after: Outcome, seed: int) -> Comparison:
        return cls(
            Change.of(before.correct, after.correct, seed),
            Change.of(before.margin, after.margin, seed),
            Change.of(before.entropy, after.entropy, seed),
        )

    @classmethod
    def read(cls, content: dict[str, Any]) -> Comparison:
        return cls(
            **{name: Change.read(content[name]) for name in ("accuracy", "margin", "entropy")}
        )


@dataclass(frozen=True)
class Calibration:
    """The calibrated edits and what they do on training and on held-out instances.

    Believe the held-out one.

    Attributes:
        method, task: their names.
        edits: ready for `model.edit(*edits)`.
        trials: one row a trial.
        train, heldout: what the edits do on the instances they were chosen on, and on others.
        trace: the steps of a method that learns; None of one that tries.
        notes: what a reader must know.
        provenance: model, weights, settings, versions, date.
        elsewhere: what the edits cost: "needles" (exact answers) and "loss" (nats a token of
            English), untouched against edited.

    Example:
        >>> found = interp.calibrate(model, "zerotuning", n=8, grid=[0.5, 2.0])
        >>> path = found.save("zerotuning.json")
        >>> interp.Calibration.load(path).edits == found.edits
        True
    """

    method: str
    task: str
    edits: list[Edit]
    trials: pd.DataFrame
    train: Comparison
    heldout: Comparison
    trace: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    elsewhere: dict[str, Change] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes the edits to `path`, a JSON file that `--edit` takes, and the record beside it.

        FILE.trials.parquet and FILE.calibration.json (train, held-out, provenance) stand beside it;
        what an earlier result left there goes.

        Args:
            path: the JSON file.

        Returns:
            The path.

        Raises:
            OutputError: it can't be written.
        """
        from interp import edits

        path = edits.save(path, self.edits)  # type: ignore[arg-type]
        digests = {"edits": _digest(path.read_bytes())}
        for name in TABLES:
            file, frame = beside(path, f"{name}.parquet"), getattr(self, name)
            if frame is None:
                file.unlink(missing_ok=True)
                continue
            table = io.BytesIO()
            frame.to_parquet(table)
            write_atomic(file, table.getvalue())
            digests[name] = _digest(table.getvalue())
        record = dict(
            format=FORMAT,
            sha256=digests,
            method=self.method,
            task=self.task,
            train=asdict(self.train),
            heldout=asdict(self.heldout),
            notes=self.notes,
            provenance=self.provenance,
            elsewhere={name: asdict(change) for name, change in self.elsewhere.items()},
        )
        write_atomic(
            beside(path, "calibration.json"),
            (json.dumps(record, indent=2, default=str) + "\n").encode(),
        )
        return path

    def _repr_html_(self) -> str:
        sizes = self.train.accuracy.baseline.n, self.heldout.accuracy.baseline.n
        rows = [
            [f"{split}, {what}", change.baseline, change.edited, change.difference]
            for split, parts in (("held out", vars(self.heldout)), ("training", vars(self.train)))
            for what, change in parts.items()
        ]
        rows += [
            [f"elsewhere, {what}", change.baseline, change.edited, change.difference]
            for what, change in self.elsewhere.items()
        ]
        return block(
            f"Calibration by {self.method}",
            f"{self.task}, {sizes[0]} training and {sizes[1]} held-out instances",
            {"edits": [repr(edit) for edit in self.edits] or "none"},
            ["", "untouched", "edited", "change"],
            rows,
            ["95 % intervals in brackets. Believe the held-out ones.", *self.notes],
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """The calibration that `save(path)` wrote.

        Raises:
            OutputError: it is missing, damaged or of another format.
        """
        import pandas as pd

        from interp import edits

        path = checked_path(path, "A saved calibration")
        head = beside(path, "calibration.json")
        try:
            record = parse(_read(head))
        except ValueError as error:
            raise OutputError(f"{head} is damaged ({error}); run the calibration again.") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise OutputError(
                f"{head} is not a calibration of format {FORMAT}; run the calibration again."
            )
        try:
            tables: dict[str, Any] = {}
            for name, digest in record["sha256"].items():
                file = path if name == "edits" else beside(path, f"{name}.parquet")
                content = _read(file)
                if _digest(content) != digest:
                    raise OutputError(
                        f"{file} is not the one that {head.name} describes; run the calibration "
                        "again."
                    )
                if name != "edits":
                    tables[name] = pd.read_parquet(io.BytesIO(content))
            return cls(
                record["method"],
                record["task"],
                list(edits.load(path)),
                tables["trials"],
                Comparison.read(record["train"]),
                Comparison.read(record["heldout"]),
                tables.get("trace"),
                list(record["notes"]),
                record["provenance"],
                {name: Change.read(c) for name, c in record.get("elsewhere", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, OSError, EditError) as error:
            raise OutputError(
                f"The calibration in {head} is damaged ({error}); run it again."
            ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(
            f"The calibration's file {path} can't be read: {reason(error)}."
        ) from error


def beside(path: Path, ending: str) -> Path:
    """act.json → act.trials.parquet, …"""
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.{ending}")
