"""What a calibration gives back, and how it is saved."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.calibration.bench import Outcome
from interp.files import write_atomic
from interp.statistics import Interval, bootstrap

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.edit import Edit


@dataclass(frozen=True)
class Change:
    """A mean untouched and edited, and their paired difference."""

    baseline: Interval
    edited: Interval
    difference: Interval

    @classmethod
    def of(cls, before: Any, after: Any, seed: int) -> Change:
        return cls(bootstrap(before, seed), bootstrap(after, seed), bootstrap(after - before, seed))


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


@dataclass(frozen=True)
class Calibration:
    """Calibrated `edits`; `trials`, one row a trial; `train` and `heldout`: what the edits do on the instances they
    were chosen on, and on others. Believe the held-out one."""

    method: str
    task: str
    edits: list[Edit]
    trials: pd.DataFrame
    train: Comparison
    heldout: Comparison
    trace: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the edits to `path`, a JSON file that `--edit` takes, and beside it FILE.trials.parquet and
        FILE.calibration.json (train, held-out, provenance). Raises `OutputError`."""
        from interp import edits

        path = edits.save(path, self.edits)  # type: ignore[arg-type]
        tables = {"trials": self.trials} | ({} if self.trace is None else {"trace": self.trace})
        for name, frame in tables.items():
            table = io.BytesIO()
            frame.to_parquet(table)
            write_atomic(beside(path, f"{name}.parquet"), table.getvalue())
        record = dict(
            method=self.method,
            task=self.task,
            train=asdict(self.train),
            heldout=asdict(self.heldout),
            notes=self.notes,
            provenance=self.provenance,
        )
        write_atomic(beside(path, "calibration.json"), (json.dumps(record, indent=2, default=str) + "\n").encode())
        return path


def beside(path: Path, ending: str) -> Path:
    """act.json → act.trials.parquet, …"""
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.{ending}")
