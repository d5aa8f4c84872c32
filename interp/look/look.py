"""Where one head looks in one text, as data: tokens, and for each the keys it looks at most."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError, OutputError
from interp.report import look_page
from interp.support.files import check_writable, reason, write_atomic
from interp.support.jsonable import jsonable

if TYPE_CHECKING:
    import pandas as pd

#: the name of the run without edits, and of the one under them
OWN, EDITED = "own", "edited"


@dataclass(frozen=True)
class View:
    """What a head's attention to a text was in one run, in O(tokens) numbers. Rows are queries.

    Attributes:
        keys, weights: (tokens, k) the k keys with the largest weights, −1 where fewer are seen.
        value_keys, values: (tokens, k) the k keys that move the stream most: a_k ‖v_k W_O‖ as a
            share of Σ_k a_k ‖v_k W_O‖.
        first, value_first: (tokens,) the first token's weight, and its share of what is moved.
        moved: (tokens,) Σ_k a_k ‖v_k W_O‖, in units of the residual stream.
        entropy: (tokens,) −Σ a ln a, in nats.
        received: (tokens,) mean weight that a key gets from the queries which see it; the page's
            lane "receives", and the frame's column.
        total: (tokens,) the sum of the weights that a key gets.
        key_norm: (tokens,) ‖v_k W_O‖ of each key.
        queries, from_weights: (tokens, r) the r queries that look at a key most, −1 where fewer do.

    Example:
        >>> view = model.look("the cat saw the dog", "L0H2").views["own"]
        >>> view.keys.shape == view.weights.shape, view.entropy.shape
        (True, (6,))
    """

    keys: np.ndarray
    weights: np.ndarray
    value_keys: np.ndarray
    values: np.ndarray
    first: np.ndarray
    value_first: np.ndarray
    moved: np.ndarray
    entropy: np.ndarray
    received: np.ndarray
    total: np.ndarray
    key_norm: np.ndarray
    queries: np.ndarray
    from_weights: np.ndarray


class Look:
    """One head on one text: shown in Jupyter by itself, as a page by `report`, as numbers by `at`.

    Attributes:
        model, head: names.
        tokens: the pieces of the text; joined they are the text.
        views: "own", and "edited" where edits were given.
        provenance: where the numbers come from.
        notes: what a reader must know.

    Example:
        >>> look = model.look("the cat saw the dog . the cat saw the dog .", "L2H4")
        >>> look
        Look(pocket-llama L2H4: 15 tokens)
        >>> look.at(8, k=2).columns.tolist()
        ['key', 'token', 'weight']
    """

    def __init__(
        self,
        model: str,
        head: str,
        tokens: list[str],
        views: Mapping[str, View],
        provenance: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self.model, self.head, self.tokens = model, head, tokens
        self.views, self.provenance, self.notes = dict(views), provenance, list(notes)

    def __repr__(self) -> str:
        beside = ", own and edited" if EDITED in self.views else ""
        return f"Look({self.model} {self.head}: {len(self.tokens):,} tokens{beside})"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def frame(self) -> pd.DataFrame:
        """A row a token: where it looks most, how concentrated, and what it receives; of the run
        without edits.

        `looks_at`, `at`, `weight`: the key with the largest weight, its place, its weight; often
        the first token, where heads rest. `past_first`, `past_first_at`, `past_first_weight`: the
        same of the keys after the first; "", −1 and NaN where there is none. `first`: the weight on
        the first token. `entropy`: in nats. `received`: the mean weight that it gets from the
        tokens which see it.

        Example:
            >>> look = model.look("the cat saw the dog", "L0H2")
            >>> look.frame.columns.tolist()[:5]
            ['token', 'looks_at', 'at', 'weight', 'past_first']
        """
        import pandas as pd

        v = self.views[OWN]
        at, weight = _largest(v, past=0)
        further, less = _largest(v, past=1)
        return pd.DataFrame(
            dict(
                token=self.tokens,
                looks_at=[self.tokens[a] if a >= 0 else "" for a in at],
                at=at,
                weight=weight,
                past_first=[self.tokens[a] if a >= 0 else "" for a in further],
                past_first_at=further,
                past_first_weight=less,
                first=v.first,
                entropy=v.entropy,
                received=v.received,
            )
        )

    def at(self, token: int, k: int = 10, view: str = OWN, by_value: bool = False) -> pd.DataFrame:
        """The keys that a token looks at most, the strongest first.

        Args:
            token: its place in the text; negative counts from the end.
            k: how many, at most; those that were kept.
            view: "own", or "edited".
            by_value: by how far they move the stream, a‖v W_O‖, instead of by weight.

        Raises:
            InputError: no such token or view.

        Example:
            >>> look = model.look("the cat saw the dog", "L0H2")
            >>> look.at(-1, k=1).token.item()
            ' the'
        """
        import pandas as pd

        if view not in self.views:
            raise InputError(
                f"There is no view {view!r} here; there is {' and '.join(self.views)}."
            )
        if not -len(self) <= token < len(self):
            raise InputError(f"There is no token {token}; the text has {len(self)}, from 0.")
        v = self.views[view]
        keys, values = (v.value_keys, v.values) if by_value else (v.keys, v.weights)
        pairs = zip(keys[token].tolist(), values[token].tolist(), strict=True)
        column = "share" if by_value else "weight"
        rows = [{"key": a, "token": self.tokens[a], column: w} for a, w in pairs if a >= 0][:k]
        return pd.DataFrame(rows, columns=["key", "token", column])

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page that opens from disk, with no network.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> model.look("the cat saw the dog", "L0H2").report("look.html").name
            'look.html'
        """
        target = Path(path)
        check_writable(target.parent)
        write_atomic(target, self.page().encode(errors="backslashreplace"))
        return target

    def page(self) -> str:
        """The page as HTML."""
        return look_page.render(self)

    def _repr_html_(self) -> str:
        return look_page.framed(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the numbers, tokens and provenance as one safetensors file.

        Raises:
            OutputError: it can't be written.

        Example:
            >>> look = model.look("the cat saw the dog", "L0H2")
            >>> type(look).load(look.save("look.safetensors")).frame.equals(look.frame)
            True
        """
        from safetensors.numpy import save

        target = Path(path)
        check_writable(target.parent)
        arrays = {
            f"{name}/{f.name}": np.ascontiguousarray(getattr(view, f.name))
            for name, view in self.views.items()
            for f in fields(View)
        }
        said = dict(
            model=self.model, head=self.head, tokens=self.tokens, notes=self.notes,
            provenance=jsonable(self.provenance),
        )  # fmt: skip
        write_atomic(target, save(arrays, {"look": json.dumps(said)}))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Look:
        """What `save` wrote, read back.

        Raises:
            OutputError: it is missing, damaged, or no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                said = json.loads((file.metadata() or {})["look"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            names = dict.fromkeys(key.partition("/")[0] for key in sorted(arrays, reverse=True))
            views = {
                n: View(**{f.name: arrays[f"{n}/{f.name}"] for f in fields(View)}) for n in names
            }
            return cls(said["model"], said["head"], said["tokens"], views, said["provenance"],
                       said["notes"])  # fmt: skip
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise OutputError(f"{path} can't be read as a look at a head ({why}).") from error


def _largest(view: View, past: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens,) places of the keys with the largest weights, from key `past` on, and the weights;
    −1 and NaN where none is kept."""
    some = np.where(view.keys < past, -1.0, view.weights)
    rows, best = np.arange(len(some)), some.argmax(1)
    weight = some[rows, best]
    return np.where(weight >= 0, view.keys[rows, best], -1), np.where(weight >= 0, weight, np.nan)
