"""Why one head looks from one token at another, and which tokens it moves the answer by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.streams.qk import QKAttribution
from interp.streams.sources import Sources
from interp.support.html import block
from interp.support.jsonable import jsonable

if TYPE_CHECKING:
    import pandas as pd

#: rows that are shown
SHOWN = 10


class Why:
    """One edge of a text, from a query to a key: who built its score, and what the head's keys do.

    Attributes:
        model, head: names.
        tokens: the pieces of the text.
        qk: the score by writers of the query and of the key (`QKAttribution`).
        sources: what each key adds to the answer's logit through this head, at the query
            (`Sources`); None where the model's vocabulary is not known.
        answer, against: the tokens whose logits are told apart, as text; `against` None for the
            mean of the vocabulary.
        provenance: where the numbers come from.
        notes: what a reader must know.

    Example:
        >>> why = model.why("the cat saw the dog . the cat saw the dog .", "L2H4")
        >>> why
        Why(pocket-llama L2H4: ...)
        >>> why.top(2).columns.tolist()
        ['query', 'key', 'score']
    """

    def __init__(
        self,
        model: str,
        tokens: list[str],
        qk: QKAttribution,
        sources: Sources | None,
        answer: str | None,
        against: str | None,
        provenance: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self.model, self.head, self.tokens = model, str(qk.head), tokens
        self.qk, self.sources, self.answer, self.against = qk, sources, answer, against
        self.provenance, self.notes = provenance, list(notes)

    def __repr__(self) -> str:
        return f"Why({self.model} {self.head}: {self.edge()}, score {self.qk.score:.3g})"

    def edge(self) -> str:
        """The query and the key, with their places."""
        qk = self.qk
        return (
            f"{self.tokens[qk.query].strip()!r} ({qk.query}) → "
            f"{self.tokens[qk.key].strip()!r} ({qk.key})"
        )

    @property
    def frame(self) -> pd.DataFrame:
        """The score as a table: rows wrote the query's stream, columns the key's.

        Example:
            >>> why = model.why("the cat saw the dog", "L2H4")
            >>> bool(abs(why.frame.to_numpy().sum() - why.qk.score) < 1e-4)
            True
        """
        return self.qk.frame

    def top(self, k: int = SHOWN) -> pd.DataFrame:
        """The pairs of writers that make up most of the score: `query`, `key`, `score`.

        Args:
            k: how many.
        """
        return self.qk.pairs(k)

    def by_query(self) -> pd.Series:
        """What each writer of the query's stream adds, the largest by size first."""
        return _by_size(self.qk.by_query())

    def by_key(self) -> pd.Series:
        """What each writer of the key's stream adds, the largest by size first."""
        return _by_size(self.qk.by_key())

    def keys(self, k: int | None = SHOWN) -> pd.DataFrame:
        """Keys by what they add to the answer's logit: `key`, `token`, `weight`, `value`.

        Empty where the vocabulary is not known.

        Args:
            k: how many; None for all.

        Example:
            >>> model.why("the cat saw the dog", "L2H4").keys(2).columns.tolist()
            ['key', 'token', 'weight', 'value']
        """
        import pandas as pd

        columns = ["key", "token", "weight", "value"]
        if self.sources is None:
            return pd.DataFrame(columns=columns)
        frame = self.sources.top(k)
        return frame.assign(token=[self.tokens[i] for i in frame["key"]])[columns]

    def to_dict(self, k: int | None = None) -> dict[str, Any]:
        """Everything as JSON can hold it.

        Args:
            k: how many pairs and keys; None for all.

        Example:
            >>> sorted(model.why("the cat saw the dog", "L2H4").to_dict(3))[:4]
            ['against', 'answer', 'by_key', 'by_query']
        """
        qk = self.qk
        edge = dict(
            query=qk.query,
            query_token=self.tokens[qk.query],
            key=qk.key,
            key_token=self.tokens[qk.key],
            score=qk.score,
            softcap=qk.softcap,
            mask_bias=qk.mask_bias,
            weight=qk.weight,
        )
        total = None if self.sources is None else float(self.sources.sums()[0])
        said = dict(
            model=self.model,
            head=self.head,
            edge=edge,
            pairs=qk.pairs(k).to_dict("records"),
            by_query=qk.by_query().to_dict(),
            by_key=qk.by_key().to_dict(),
            answer=self.answer,
            against=self.against,
            direct=total,
            keys=self.keys(k).to_dict("records"),
            notes=self.notes,
            provenance=self.provenance,
        )
        return dict(jsonable(said))

    def toward(self) -> str:
        """The logit that keys are measured by, in words."""
        rival = "the vocabulary's mean" if self.against is None else f"{self.against.strip()!r}"
        return f"{(self.answer or '').strip()!r} over {rival}"

    def facts(self) -> dict[str, Any]:
        """What was asked and found, in words."""
        qk = self.qk
        said = {"score": f"{qk.score:.4g}", "weight": f"{qk.weight:.3f}"}
        if qk.softcap is not None:
            said["softcap"] = f"{qk.softcap:g} (the parts are of the score before it)"
        if qk.mask_bias:
            said["the mask adds"] = f"{qk.mask_bias:.4g}"
        if self.sources is not None:
            said["direct"] = f"{float(self.sources.sums()[0]):+.4g} to {self.toward()}"
        return said

    def _repr_html_(self) -> str:
        pairs = [
            (f"{row.query} → {row.key}", f"{row.score:+.3f}")
            for row in self.top().itertuples()
        ]  # fmt: skip
        shown = block(
            f"{self.head} of {self.model}", self.edge(), self.facts(),
            ["query's writer → key's writer", "score"], pairs, self.notes,
        )  # fmt: skip
        if self.sources is None:
            return shown
        rows = [
            (f"{row.token.strip()} ({row.key})", f"{row.weight:.3f}", f"{row.value:+.4f}")
            for row in self.keys().itertuples()
        ]
        more = block("Keys", f"by what they add to {self.toward()}", {},
                     ["key", "weight", "adds"], rows)  # fmt: skip
        return f"<div>{shown}{more}</div>"


def _by_size(series: pd.Series) -> pd.Series:
    return series.iloc[series.abs().to_numpy().argsort(kind="stable")[::-1]]
