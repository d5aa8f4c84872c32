"""Classification of one's own texts: a file of `{"text", "label"}` lines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.tasks.file_task import FileTask
from interp.tasks.formats import SHOTS, spellings
from interp.tasks.task import Instance, first_tokens


@dataclass(frozen=True)
class Labelled(FileTask):
    """Which label a text has, by the model's preference among the labels' first tokens.

    The prompt shows `shots` other texts of the file with their labels and ends in "Text: …" and
    "Label:", after a line that names the labels; sentiments go without that line, as "Review: …"
    and "Sentiment:". The format "lead" begins the answer, "The label is". Problems take the file's
    texts in an order drawn by the seed, none twice; the corrupted prompt ends in another text, cut
    or repeated to the same number of tokens, whose label is different.

    `info`: `label`, `row` of the file, `text` (start, end) token span of the text that is judged.

    Args:
        path: JSON Lines, each {"text": …, "label": …}.
        shots: labelled examples before the text.
        format: as in `Task`.

    Example:
        >>> from pathlib import Path
        >>> lines = ['{"text": "a fine film", "label": "good"}', '{"text": "dull", "label": "bad"}']
        >>> _ = Path("films.jsonl").write_text("\\n".join(lines))
        >>> interp.tasks.get("films.jsonl").labels
        ('bad', 'good')
    """

    shots: int = 0

    name = "labelled"
    summary = "classification of one's own texts"
    citation = "prompts as in ACT (arXiv 2406.15765) and ZeroTuning (arXiv 2505.11739)"
    judge = "choice"
    columns = ("text", "label")
    rows_are = "texts"
    formats = ("bare", "lead", "few-shot", "chat")

    def __post_init__(self) -> None:
        object.__setattr__(self, "chance", self.majority)
        super().__post_init__()

    def check(self, rows: list[dict[str, Any]]) -> None:
        if len({row["label"] for row in rows}) < 2:
            raise InputError(f"All texts of {self.path} have the same label; give at least two.")

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels, sorted."""
        return tuple(sorted({row["label"] for row in self.rows}))

    @property
    def _sentiment(self) -> bool:
        return set(self.labels) <= {"negative", "neutral", "positive"}

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent label."""
        labels = [row["label"] for row in self.rows]
        return max(labels.count(label) for label in self.labels) / len(labels)

    def problem(self, text: Text, index: int, rng: np.random.Generator) -> Instance:
        row = self.rows[index]
        shots = self.shots + SHOTS * (self.format == "few-shot")
        shown = [self.rows[i] for i in rng.permutation(len(self.rows)) if i != index][:shots]
        others = [r for r in self.rows if r["label"] != row["label"]]
        other = others[int(rng.integers(len(others)))]
        before, after = self._around(text, shown)
        said, swapped = (text.encode(f" {r['text']}") for r in (row, other))
        swapped = (swapped * -(-len(said) // len(swapped)))[: len(said)]
        spelled = spellings if self.format == "chat" else lambda answer: (answer,)
        right = first_tokens(text, [spelled(f" {row['label']}")])
        wrong = first_tokens(
            text, [spelled(f" {label}") for label in self.labels if label != row["label"]]
        )
        if set(right) & set(wrong):
            raise InputError(
                f"Two labels of {self.path} begin with the same token for this tokenizer, so they "
                "can't be told apart; use other words for them."
            )
        ids = (*before, *said, *after)
        return Instance(
            ids,
            (len(ids) - 1,),
            (right,),
            (wrong,),
            (*before, *swapped, *after),
            dict(label=row["label"], row=index, text=(len(before), len(before) + len(said))),
        )

    def _around(self, text: Text, shown: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids before the text that is judged, and from it to the answer."""
        thing, asked = ("Review", "Sentiment") if self._sentiment else ("Text", "Label")
        solved = "".join(f"{thing}: {r['text']}\n{asked}: {r['label']}\n\n" for r in shown)
        listed = f"{', '.join(self.labels[:-1])} or {self.labels[-1]}"
        if self.format == "chat":
            before, after = text.around_user()
            head = (
                f"Is the {asked.lower()} of the last {thing.lower()} {listed}? Say it in one word."
            )
            return text.plain(f"{before}{head}\n\n{solved}{thing}:"), text.encode(after)
        head = "" if self._sentiment else f"Label each text as {listed}.\n\n"
        lead = f" The {asked.lower()} is" if self.format == "lead" else ""
        return text.prompt(f"{head}{solved}{thing}:"), text.encode(f"\n{asked}:{lead}")
