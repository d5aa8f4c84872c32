"""What attention calls answer: one layer's statistics (`LayerStats`), and a recording of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.question import Question
from interp_kernels import Result
from interp_kernels.budget import vector_norms


class LayerStats:
    """One layer's statistics from one forward; row statistics are attributes: `.entropy`.

    Row statistics are (batch, heads, queries); positions are absolute slots.

    Attributes:
        site: the layer.
        pair_mass, received, received_count: name → (batch, heads, queries), (batch, heads, keys)
            and (batch, 1, keys).
        topk_index, topk_prob: where they were asked for.
        queries, keys: (batch, queries) and (batch, keys) bool: real ones, not padding.
        z, call: where they were asked for, else None.

    Example:
        >>> from interp_hooks import Question
        >>> seen = []
        >>> with model.watch(Question(frozenset({"entropy"})), seen.append):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> seen[2].entropy.shape, seen[2].mean("entropy").shape
        (torch.Size([1, 8, 8]), torch.Size([1, 8]))
    """

    def __init__(
        self, call: AttentionCall, result: Result, question: Question, z: torch.Tensor | None
    ):
        self.site, self.z = call.site, z
        self.call = call if question.call else None
        self.q_start, self.k_start = call.mask.q_start, call.mask.k_start
        device = call.value.device
        batch = call.batch
        self.queries = _real(call.mask.queries, batch, call.n_queries, device)
        self.keys = _real(call.mask.keys, batch, call.n_keys, device)
        self.rows: dict[str, torch.Tensor] = {}
        self.pair_mass: dict[str, torch.Tensor] = {}
        self.received: dict[str, torch.Tensor] = {}
        self.received_count: dict[str, torch.Tensor] = {}
        for name, value in result.stats.items():
            kind, _, label = name.partition(":")
            if kind in ("argmax", "topk_index"):
                value = torch.where(value >= 0, value + self.k_start, value)
            if kind in ("pair_mass", "received", "received_count"):
                getattr(self, kind)[label] = value
            else:
                self.rows[kind] = value
        if "key_mass" in question.names and "group_mass" in self.rows:
            masses = self.rows.pop("group_mass")  # with one group more than was asked for
            self.rows["key_mass"] = masses.sum(-1)
            if "group_mass" in question.names and masses.shape[-1] > 1:  # none in a vision tower
                self.rows["group_mass"] = masses[..., :-1]
        if "value_norm" in question.names:
            self.rows["value_norm"] = vector_norms(call.value)  # (batch, kv_heads, keys)

    def __getattr__(self, name: str) -> torch.Tensor:
        rows = self.__dict__.get("rows", {})
        if name in rows:
            return rows[name]
        raise AttributeError(
            f"{name!r} was not asked for; name it in observe(...), or in a score's Question."
        )

    def mean(self, name: str, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of a row statistic over real queries, (batch, heads).

        Args:
            name: the statistic.
            keep: (batch, queries) bool: only these queries.

        Example:
            >>> from interp_hooks import Question
            >>> seen = []
            >>> with model.watch(Question(frozenset({"max"})), seen.append):
            ...     _ = model.logits(torch.arange(8)[None])
            >>> bool(torch.allclose(seen[2].mean("max"), seen[2].max.mean(-1)))
            True
        """
        rows = self.queries if keep is None else self.queries & keep.to(self.queries.device)
        weight = rows[:, None].float()
        total = weight.sum(-1)
        if name not in self.rows:
            raise TapError(
                f"{name!r} is no row statistic that was asked for; there are "
                f"{', '.join(self.rows) or 'none'}. Pair masses are averaged where they are used."
            )
        summed = (self.rows[name] * weight).sum(-1)
        return torch.where(total > 0, summed / total.clamp_min(1), torch.nan)


def _real(mask: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    return (
        torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is None
        else mask.expand(batch, -1)
    )


def _widen(columns: torch.Tensor, width: int) -> torch.Tensor:
    """The columns, with zeros up to `width`."""
    return torch.nn.functional.pad(columns, (0, width - columns.shape[-1]))


@dataclass(frozen=True)
class Span:
    """One forward within a recording: queries start … stop (rows of the recording), first at slot
    `q_start`."""

    start: int
    stop: int
    q_start: int


#: bin edges of reduce="histogram": probabilities, nats, tokens (powers of two)
EDGES = {
    "entropy": torch.linspace(0, 12, 49),
    "distance": torch.cat([torch.zeros(1), 2.0 ** torch.arange(0, 18)]),
    "capped_distance": torch.linspace(0, 64, 65),
}
PROBABILITY_EDGES = torch.linspace(0, 1, 51)


class LayerRecord:
    """What was seen of one layer over all forwards of an `observe` block."""

    def __init__(self, site: Site, reduce: str):
        self.site, self.reduce = site, reduce
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._joined: dict[str, torch.Tensor] = {}
        self._columns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._queries: list[torch.Tensor] = []

    def add(self, stats: LayerStats) -> None:
        self._joined.clear()
        if self._queries and len(self._queries[-1]) != len(stats.queries):
            raise TapError(
                f"A block records forwards of one batch size: this one has {len(stats.queries)} "
                f"rows, those before had {len(self._queries[-1])}; open a block for each."
            )
        self._queries.append(stats.queries)
        row_like = {**stats.rows, **{f"pair_mass:{k}": v for k, v in stats.pair_mass.items()}}
        for name, value in row_like.items():
            if name == "value_norm":
                self._rows[name] = [value]  # keys already include the earlier ones
            elif self.reduce == "none":
                self._rows.setdefault(name, []).append(value)
            elif name not in ("argmax", "topk_index", "topk_prob"):
                self._accumulate(name, value, stats.queries)
        for name, mean in stats.received.items():
            count = stats.received_count[name]
            self._add_columns(name, mean * count, count, stats.k_start)

    def _accumulate(self, name: str, value: torch.Tensor, queries: torch.Tensor) -> None:
        weight = queries[:, None].float()  # (batch, 1, queries)
        if value.ndim == 4:
            weight = weight[..., None]
        if self.reduce == "mean":
            new = torch.stack(
                [(value * weight).sum(2), weight.sum(2).expand(value.shape[:2] + value.shape[3:])]
            )
        else:
            edges = EDGES.get(name, PROBABILITY_EDGES).to(value.device)
            bins = torch.bucketize(
                value.contiguous(), edges[1:-1], right=True
            )  # 0 … len(edges) − 2
            one_hot_weight = weight.expand(value.shape)
            new = value.new_zeros(*value.shape[:2], *value.shape[3:], len(edges) - 1)
            moved = (
                (bins, one_hot_weight)
                if value.ndim == 3
                else (bins.movedim(2, -1), one_hot_weight.movedim(2, -1))
            )
            new.scatter_add_(-1, *moved)
        self._rows[name] = [self._rows[name][0] + new] if name in self._rows else [new]

    def _add_columns(
        self, name: str, total: torch.Tensor, count: torch.Tensor, k_start: int
    ) -> None:
        total, count = (torch.nn.functional.pad(t, (k_start, 0)) for t in (total, count))
        if name in self._columns:
            old_total, old_count = self._columns[name]
            width = max(total.shape[-1], old_total.shape[-1])
            total = _widen(total, width) + _widen(old_total, width)
            count = _widen(count, width) + _widen(old_count, width)
        self._columns[name] = (total, count)

    def received_by(self, name: str) -> torch.Tensor:
        """Mean attention each key receives from the queries of a set, (batch, heads, slots).

        All forwards together.

        Args:
            name: of the set, as given to `observe(received=…)`.
        """
        total, count = self._columns[name]
        return total / count.clamp_min(1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What was recorded, name → shape."""
        names = list(self._rows) + (["received"] if "all" in self._columns else [])
        sets = {n: self.received_by(n) for n in self._columns if n != "all"}
        return {n: tuple(self[n].shape) for n in names} | {
            f"received {n}": tuple(v.shape) for n, v in sets.items()
        }

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {shape}" for name, shape in self.shapes().items())
        return f"<layer {self.site.layer}: {said or 'nothing'}>"

    @property
    def queries(self) -> torch.Tensor:
        """(batch, queries) bool: real rows, not padding."""
        return torch.cat(self._queries, 1)

    @property
    def pair_mass(self) -> dict[str, torch.Tensor]:
        """name → (batch, heads, queries)."""
        return {n.partition(":")[2]: self[n] for n in self._rows if n.startswith("pair_mass:")}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "received" and "all" in self._columns:
            return self.received_by("all")
        if name not in self._rows:
            raise AttributeError(
                f"{name!r} was not asked for; name it in observe(...), or in a score's Question."
            )
        if name not in self._joined:
            parts = self._rows[name]
            if self.reduce == "mean" and name != "value_norm":
                total, count = parts[0]
                self._joined[name] = total / count.clamp_min(1)
            else:
                self._joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return self._joined[name]

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]


class Recording:
    """The recording of an `observe` block: `seen[layer].entropy`, `seen["vision", 2].max`.

    `seen.calls` are the forwards in it, as spans of its rows.

    Example:
        >>> with model.observe("entropy") as seen:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> len(seen), seen[2].entropy.shape, seen.calls[0].stop
        (4, torch.Size([1, 8, 8]), 8)
    """

    def __init__(self, question: Question, reduce: str, stage: str):
        self.question, self.reduce, self.stage = question, reduce, stage
        self.calls: list[Span] = []
        self._records: dict[tuple[str, str, int], LayerRecord] = {}

    def add(self, stats: LayerStats) -> None:
        site = stats.site
        record = self._records.setdefault(
            (site.tower, site.kind, site.layer), LayerRecord(site, self.reduce)
        )
        record.add(stats)
        if record is next(iter(self._records.values())):
            start = self.calls[-1].stop if self.calls else 0
            self.calls.append(Span(start, start + stats.queries.shape[1], stats.q_start))

    def __getitem__(self, key: int | tuple[str, int]) -> LayerRecord:
        tower, layer = key if isinstance(key, tuple) else (None, key)
        here = [
            (t, kind, record)
            for (t, kind, number), record in self._records.items()
            if number == layer
        ]
        if tower is None:  # the main tower's self-attention, not a vision tower's or an encoder's
            here.sort(key=lambda found: (found[0] not in ("", "text"), found[1] != "self"))
            if here and here[0][1] == "self":
                return here[0][2]
        for t, kind, record in here:
            if tower is not None and tower in (t, kind):
                return record
        raise TapError(
            f"Layer {key} was not seen: run the model inside the block, and check the layer's "
            "number."
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self._shapes().items())
        return f"Recording({self._about()}{': ' if shapes else ''}{shapes})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(str(shape))}</td></tr>"
            for name, shape in self._shapes().items()
        )
        table = f"<table><thead><tr><th>seen[layer].…</th><th>shape</th></tr></thead>{rows}</table>"
        return (
            f"<div><strong>Recording</strong>, {escape(self._about())}{table if rows else ''}</div>"
        )

    def _about(self) -> str:
        """How much was seen, and before or after edits."""
        layers = {(t, kind): 0 for t, kind, _ in self._records}
        for t, kind, _ in self._records:
            layers[t, kind] += 1
        said = [
            f"{n} layers{f' of {t}' if t else ''}{' (cross)' if kind == 'cross' else ''}"
            for (t, kind), n in layers.items()
        ]
        if not said:
            return "nothing seen yet: run the model inside the block"
        tokens = self.calls[-1].stop if self.calls else 0
        forwards = f"{len(self.calls)} forward{'s' if len(self.calls) != 1 else ''}"
        return f"{', '.join(said)}, {tokens:,} queries in {forwards}, {self.stage} edits"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape in the first layer that was seen."""
        return next(iter(self._records.values())).shapes() if self._records else {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self._records.values())
