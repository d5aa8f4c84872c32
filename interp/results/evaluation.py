"""What an evaluation found: intervals, paired tests, a row an instance, where it comes from; saved
and read back."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import OutputError
from interp.support import typed
from interp.support.checked import path
from interp.support.files import check_writable, write_atomic
from interp.support.html import block
from interp.support.json_text import parse
from interp.support.statistics import Interval, McNemar, bootstrap, mcnemar

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.edit import Edit

FORMAT = 1
HEAD, ROWS = "evaluation.json", "evaluation.parquet"


@dataclass(frozen=True)
class Comparison:
    """One metric: untouched, edited and the paired difference; the last two None without edits."""

    baseline: Interval
    edited: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Control:
    """The same edits of random heads, as many and of the same layers.

    `difference`: their change of the metric, averaged over draws instance by instance; `beyond`:
    the edited metric less theirs, paired; `draws`: the mean change of each; `heads`: theirs.
    """

    difference: Interval
    beyond: Interval
    draws: list[float]
    heads: list[list[str]]

    def __str__(self) -> str:
        return (
            f"{len(self.draws)} draws of random heads of the same layers change it by "
            f"{self.difference} ({min(self.draws):+.3f} … {max(self.draws):+.3f}); the edit does "
            f"{self.beyond} more"
        )


@dataclass(frozen=True)
class Evaluation:
    """A metric's mean over instances, untouched and edited, as `Interval`s.

    Attributes:
        task, metric: their names.
        baseline, edited, difference: intervals, the difference paired; the last two None without
            edits.
        frame: one row an instance with `baseline` and `edited` (and more by metric: margins,
            tokens).
        mcnemar: the exact paired test, where every answer is right or wrong.
        provenance: model, weights, settings, edits, versions, date.
        notes: what a reader must know, such as a context past the model's positions.
        more: other metrics of the same answers, by name.
        control: the same edits of random heads, where asked for (`controls=`).

    Example:
        >>> found = interp.evaluate(model, "induction", [interp.edits.Ablate(["L2H3"])], n=4)
        >>> found.difference.n, list(found.frame)
        (4, ['baseline', 'baseline_margin', 'edited', 'edited_margin'])
    """

    task: str
    metric: str
    baseline: Interval
    edited: Interval | None
    difference: Interval | None
    frame: pd.DataFrame
    mcnemar: McNemar | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    more: dict[str, Comparison] = field(default_factory=dict)
    control: Control | None = None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `evaluation.json` and `evaluation.parquet` into a folder (made if need be).

        Returns:
            The folder.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> found = interp.evaluate(model, "induction", n=4)
            >>> interp.Evaluation.load(found.save("evaluation")).baseline == found.baseline
            True
        """
        target = Path(folder)
        check_writable(target)
        table = io.BytesIO()
        self.frame.to_parquet(table, index=False)
        content = {
            "format": FORMAT,
            "frame_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
            **self.summary(),
        }
        write_atomic(target / ROWS, table.getvalue())
        write_atomic(
            target / HEAD,
            (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(
                errors="backslashreplace"
            ),
        )
        return target

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, as JSON holds it.

        Example:
            >>> found = interp.evaluate(model, "induction", n=4)
            >>> found.summary()["baseline"]["n"]
            4
        """
        summary: dict[str, Any] = {"task": self.task, "metric": self.metric}
        for name in ("baseline", "edited", "difference", "mcnemar"):
            value = getattr(self, name)
            summary[name] = None if value is None else asdict(value)
        more = {name: asdict(value) for name, value in self.more.items()}
        if self.control is not None:
            summary["control"] = asdict(self.control)
        return {**summary, "more": more, "notes": list(self.notes), "provenance": self.provenance}

    def _repr_html_(self) -> str:
        about = f"{self.metric}, {self.baseline.n} instances of {self.task}"
        columns = ["untouched", "edited", "change"][: 1 if self.edited is None else 3]
        rows: list[list[Any]] = [[self.metric, self.baseline, self.edited, self.difference]]
        rows += [[name, c.baseline, c.edited, c.difference] for name, c in self.more.items()]
        test = [] if self.mcnemar is None else [f"McNemar, exact: {self.mcnemar}"]
        test += [] if self.control is None else [f"Control: {self.control}."]
        return block(
            str(self.provenance.get("model") or "Evaluation"),
            about,
            headings=["", *columns],
            rows=[row[: len(columns) + 1] for row in rows],
            notes=["95 % intervals in brackets.", *test, *self.notes],
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing, damaged or of another format.
        """
        import pandas as pd

        source = path(folder, "A saved evaluation")
        try:
            content = parse((source / HEAD).read_text(encoding="utf-8"))
            table = (source / ROWS).read_bytes()
        except OSError as error:
            raise OutputError(f"There is no evaluation in {source}: {error.strerror}.") from error
        except ValueError as error:
            raise OutputError(
                f"{source / HEAD} is damaged ({error}); run the evaluation again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OutputError(
                f"{source / HEAD} is not an evaluation of format {FORMAT}; run the evaluation "
                "again."
            )
        if hashlib.sha256(table).hexdigest() != content.get("frame_sha256"):
            raise OutputError(
                f"{source / ROWS} is not the one that {HEAD} describes; run the evaluation again."
            )
        try:
            intervals = _intervals(content)
            more = {
                name: Comparison(*_intervals(value))  # type: ignore[arg-type]
                for name, value in content.get("more", {}).items()
            }
            test = None if content["mcnemar"] is None else typed.made(McNemar, content["mcnemar"])
            typed.check_fields(cls, {k: content[k] for k in ("task", "metric", "provenance")})
            return cls(
                content["task"],
                content["metric"],
                *intervals,  # type: ignore[arg-type, call-arg]
                pd.read_parquet(io.BytesIO(table)),
                test,
                content["provenance"],
                tuple(typed.texts(content["notes"])),
                more,
                _control(content.get("control")),
            )
        except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:
            raise OutputError(
                f"The evaluation in {source} is damaged ({error}); run it again."
            ) from error


def _intervals(content: dict[str, Any]) -> list[Interval | None]:
    """Baseline, edited and difference, as they were written."""
    names = ("baseline", "edited", "difference")
    return [
        None if content[name] is None else typed.made(Interval, content[name]) for name in names
    ]


def _control(content: Any) -> Control | None:
    """The control as it was written."""
    if content is None:
        return None
    change, beyond = (typed.made(Interval, content[name]) for name in ("difference", "beyond"))
    draws, heads = content["draws"], content["heads"]
    if not draws or len(draws) != len(heads):
        raise ValueError("a control has heads for each of its draws")
    return Control(change, beyond, [float(d) for d in draws], [typed.texts(h) for h in heads])


def summarise(
    task: str,
    metric: str,
    frame: pd.DataFrame,
    seed: int,
    provenance: dict[str, Any],
    notes: Sequence[str] = (),
) -> Evaluation:
    """An `Evaluation` from its rows: `baseline`, and `edited` where there were edits."""
    baseline = bootstrap(frame.baseline.tolist(), seed)
    edited = difference = test = None
    if "edited" in frame:
        edited = bootstrap(frame.edited.tolist(), seed)
        difference = bootstrap((frame.edited - frame.baseline).tolist(), seed)
        test = mcnemar(frame.baseline.tolist(), frame.edited.tolist())
    return Evaluation(
        task, metric, baseline, edited, difference, frame, test, provenance, tuple(notes)
    )


def edits_as_json(edits: Sequence[Edit]) -> list[Any]:
    """Edits for the record: their JSON form, or their repr where they have none (edits made for one
    occasion)."""
    forms: list[Any] = []
    for edit in edits:
        try:
            form = edit.to_json()  # type: ignore[attr-defined]
            json.dumps(form)
        except (AttributeError, TypeError, ValueError):
            form = {"edit": type(edit).__name__, "repr": repr(edit)}
        forms.append(form)
    return forms
