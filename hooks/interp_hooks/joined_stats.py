"""One layer's statistics of a text that came in several forwards over one cache, as of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from interp_hooks.call import Site
from interp_hooks.errors import TapError
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class JoinedStats:
    """Takes the statistics of each layer and forward, and gives each layer's of all of them.

    Rows stand one after the other. What keys received is added up as it comes, so that it is held
    once and not once a forward.

    Args:
        question: what was asked.
        length: tokens of the whole text.

    Raises:
        TapError: the question asks for attention calls or weights themselves, which are of one
            forward each.

    Example:
        >>> from interp_hooks import Question
        >>> question, ids = Question(frozenset({"max"})), torch.arange(8)[None]
        >>> joined = JoinedStats(question, 8)
        >>> with model.watch(question, joined.add):
        ...     out = model.module(ids[:, :5], use_cache=True)
        ...     _ = model.module(ids[:, 5:], past_key_values=out.past_key_values)
        >>> [stats.max.shape for stats in joined][2]
        torch.Size([1, 8, 8])
    """

    def __init__(self, question: Question, length: int) -> None:
        if question.call or question.weights is not None:
            raise TapError(
                "Attention calls and their weights are of one forward each; ask for them without "
                "chunks."
            )
        self._question, self._length = question, length
        self._layers: dict[Site, _Layer] = {}

    def add(self, stats: LayerStats) -> None:
        """One layer's, of one forward."""
        layer = self._layers.get(stats.site)
        if layer is None:
            asked = self._question.at(stats.site).received
            reduces: dict[str, str] = {name: one.reduce for name, one in asked.items()}
            layer = self._layers[stats.site] = _Layer(stats, self._length, reduces)
        layer.add(stats)

    def __iter__(self) -> Iterator[LayerStats]:
        """In the order in which layers were first seen; each is given up as it is given."""
        for site in list(self._layers):
            yield self._layers.pop(site).joined()


class _Layer:
    def __init__(self, first: LayerStats, length: int, reduces: Mapping[str, str]) -> None:
        self._first, self._length, self._reduces = first, length, reduces
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._pairs: dict[str, list[torch.Tensor]] = {}
        self._queries: list[torch.Tensor] = []
        self._z: list[torch.Tensor] = []
        self._received: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._norms: torch.Tensor | None = None
        self._keys = first.keys.new_zeros(len(first.keys), length)

    def add(self, stats: LayerStats) -> None:
        here = slice(stats.k_start, stats.k_start + stats.keys.shape[-1])
        self._queries.append(stats.queries)
        self._keys[:, here] = stats.keys
        for name, value in stats.rows.items():
            if name == "value_norm":
                self._norms = self._wide(self._norms, value)
                self._norms[..., here] = value
            else:
                self._rows.setdefault(name, []).append(value)
        for name, value in stats.pair_mass.items():
            self._pairs.setdefault(name, []).append(value)
        for name, value in stats.received.items():
            self._receive(name, value, stats.received_count[name], here)
        if stats.z is not None:
            self._z.append(stats.z)

    def _wide(self, whole: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
        """`whole`, or zeros like `part` for all keys."""
        return part.new_zeros(*part.shape[:-1], self._length) if whole is None else whole

    def _receive(self, name: str, value: torch.Tensor, count: torch.Tensor, here: slice) -> None:
        total = self._received[name] = self._wide(self._received.get(name), value)
        seen = self._counts[name] = self._wide(self._counts.get(name), count)
        how = self._reduces.get(name, "mean")
        if how == "max":
            total[..., here] = torch.maximum(total[..., here], value)
        else:
            total[..., here] += value * count if how == "mean" else value
        seen[..., here] += count

    def joined(self) -> LayerStats:
        """All forwards' as one; keys are counted from slot 0."""
        out = LayerStats.__new__(LayerStats)
        out.site, out.call = self._first.site, None
        out.q_start, out.k_start = self._first.q_start, 0
        out.queries, out.keys = torch.cat(self._queries, 1), self._keys
        out.z = torch.cat(self._z, 1) if self._z else None
        out.rows = {name: torch.cat(values, 2) for name, values in self._rows.items()}
        if self._norms is not None:
            out.rows["value_norm"] = self._norms
        out.pair_mass = {name: torch.cat(values, 2) for name, values in self._pairs.items()}
        out.received_count = self._counts
        out.received = {
            name: total / self._counts[name].clamp_min(1)
            if self._reduces.get(name, "mean") == "mean"
            else total
            for name, total in self._received.items()
        }
        return out
