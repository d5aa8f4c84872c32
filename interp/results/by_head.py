"""A table of scores as Python's own habits have it: by name, by head, in a loop, with `in`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp.errors import HeadError, UnknownNameError
from interp.results.places import KVHead, Layer, Place, parse
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.results.about import About


class ByHead:
    """The faces of a table that Python gives brackets, `in`, `len` and `for`; a `HeadTable` has
    the rest."""

    if TYPE_CHECKING:
        frame: pd.DataFrame

        @property
        def model(self) -> str: ...
        @property
        def scores(self) -> list[str]: ...
        @property
        def towers(self) -> list[str]: ...
        @property
        def query_heads_known(self) -> bool: ...
        def about(self, score: str) -> About: ...
        def matrix(self, score: str, tower: str = "", kind: str | None = None) -> Any: ...
        def _rows(self, target: Place, tower: str, kind: str | None = None) -> pd.DataFrame: ...
        def _check(self, score: str) -> None: ...
        def _check_query_heads(self, target: Place) -> None: ...

    def __getitem__(self, name: Any) -> Any:
        """A score's matrix, or a head's scores.

        Args:
            name: a score, for its (layers, heads), masked where not measured, see `matrix`; or a
                head in any spelling ("L5H1", (5, 1)), for `row(head)`. What names both is the
                score.

        Raises:
            UnknownNameError: neither a score nor a head.
            HeadError: a head that is not there.
            InputError: models of several towers: `matrix(score, tower=…)`.

        Example:
            >>> atlas["previous_token"].shape, bool(atlas["L0H2"]["previous_token"] > 0.9)
            ((4, 8), True)
        """
        if isinstance(name, str) and name in self.scores:
            return self.matrix(name)
        try:
            place = parse(name)
        except HeadError:
            if isinstance(name, str):
                self._check(name)  # with the nearest names
            raise UnknownNameError(
                f"An atlas is asked for a score or a head, like atlas[{_example(self)!r}] or "
                f'atlas["L5H1"], not {name!r}.'
            ) from None
        return self.row(place)

    def row(self, head: Any) -> pd.Series:
        """All scores of one head, by name; NaN where not measured.

        Args:
            head: in any spelling; without a tower, of the main one; of its self-attention, where
                it has any. A key/value head ("L5KV1") or a layer ("L5") has the scores that belong
                to such.

        Raises:
            HeadError: a head that is not there.
            InputError: a table of key/value heads that was read without their model.

        Example:
            >>> atlas.row("L0H2").index.tolist(), atlas.row("L0H2").name
            (['previous_token'], 'L0H2')
        """
        place = parse(head)
        if isinstance(place, Head):
            self._check_query_heads(place)
        rows = self._rows(place, place.tower or self._main_tower())
        kinds = set(rows["kind"])
        rows = rows[rows["kind"] == ("self" if "self" in kinds else min(kinds))]
        names = self.scores
        if not isinstance(place, Head):
            grain = "layer" if isinstance(place, Layer) else "kv_head"
            names = [s for s in names if self.about(s).grain == grain]
        values = {score: float(rows[score].iloc[0]) for score in names}
        return pd.Series(values, index=pd.Index(names, dtype=object), name=str(place), dtype=float)

    def __iter__(self) -> Iterator[Head | KVHead]:
        """Each head once, in the model's order (tower, layer, head); key/value heads in a table of
        these that was read without their model. Names of scores are `scores`."""
        frame, known = self.frame, self.query_heads_known
        index = frame["head" if known else "kv_head"]
        kind = Head if known else KVHead
        places = zip(frame["tower"], frame["layer"], index, strict=True)
        for tower, layer, within in dict.fromkeys(places):
            yield kind(int(layer), int(within), str(tower))

    def __len__(self) -> int:
        """How many heads it has, as many as a loop over it gives."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Whether it has a score of this name, or this head (key/value head, layer), in any
        spelling."""
        if isinstance(name, str) and name in self.scores:
            return True
        try:
            place = parse(name)
            return not self._rows(place, place.tower or self._main_tower()).empty
        except HeadError:
            return False

    def _main_tower(self) -> str:
        """The tower that a head without one is of."""
        return next((t for t in ("", "text") if t in self.towers), self.towers[0])


def _example(table: Any) -> str:
    return table.scores[0] if table.scores else "sink"
