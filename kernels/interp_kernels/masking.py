"""Which keys a block of query rows sees, without ever building the whole (queries, keys) matrix."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .looking import lazy, may_look
from .request import Mask, Received

#: Logit of a key that is not seen. Finite, so that 0 · INVISIBLE = 0 (−inf would give NaN in Σ
#: p·s).
INVISIBLE = -1e30
#: A running maximum is never below this: a row that sees nothing then gets exp(INVISIBLE − FLOOR) =
#: 0 everywhere.
FLOOR = -1e29
#: Elements of a mask that is kept for the next chunk of rows.
_KEPT = 1 << 20


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if anything is float64, else float32: half inputs are always upcast."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs as much as a small operation where it does nothing."""
    return x if x.dtype is dtype else x.to(dtype)


def bias_visible(bias: Tensor) -> Tensor:
    """bool: the float bias does not hide the key. −inf, finfo.min and everything near −1e30 and
    below hide it."""
    return bias > max(torch.finfo(bias.dtype).min / 2, FLOOR)


class Visibility:
    """A `Mask` prepared for one call: rows 0…lq, columns 0…lk, (batch, heads) of the queries.

    Block arguments are half-open: rows r0:r1, columns c0:c1, `bs` a slice of the batch, `hs` a
    slice of query heads.
    """

    def __init__(
        self, mask: Mask, batch: int, heads: int, lq: int, lk: int, device: torch.device
    ) -> None:
        self.mask, self.device = mask, device
        self.batch, self.heads, self.lq, self.lk = batch, heads, lq, lk
        #: Tokens kept beyond the window; 0 where the window hides nothing.
        self.keep_first = 0
        #: what → (rows less columns, how many rows and columns, the mask there)
        self._last: dict[Hashable, tuple[tuple[int, int, int], Tensor]] = {}
        self.keys: Tensor | None = None
        self.rows: Tensor | None = None
        plain = mask.window is None and mask.keep_first == 0 and mask.starts is None
        if plain and mask.keys is None and mask.queries is None and mask.dense is None:
            return  # a decode step is short: nothing to check
        if mask.window is not None and mask.window < 1:
            raise ValueError(
                f"A sliding window of {mask.window} keys sees nothing; it must be at least 1."
            )
        self._check("keys", mask.keys, [(batch, lk)])
        self._check("queries", mask.queries, [(batch, lq)])
        if mask.dense is not None:
            self._check(
                "dense", mask.dense, [(b, h, lq, lk) for b in (1, batch) for h in (1, heads)]
            )
        if mask.keep_first < 0:
            raise ValueError(f"mask.keep_first is {mask.keep_first}; it counts tokens.")
        self._check("starts", mask.starts, [(batch,)])
        if mask.starts is not None and (
            mask.starts.is_floating_point() or mask.starts.dtype == torch.bool
        ):
            raise ValueError(
                f"mask.starts are {mask.starts.dtype}; they must be integers, slots of first "
                "tokens."
            )
        self.keep_first = mask.keep_first if self._window_hides() else 0
        self.keys = None if mask.keys is None else mask.keys.to(device=device, dtype=torch.bool)
        self.rows = (
            None if mask.queries is None else mask.queries.to(device=device, dtype=torch.bool)
        )

    def _window_hides(self) -> bool:
        """Some row is farther from a key, which causality lets it see, than the window reaches."""
        first = self.mask.q_start - self.mask.k_start
        last = first + self.lq - 1
        reach = last if self.mask.causal else max(abs(last), abs(first - self.lk + 1))
        return self.mask.window is not None and reach >= self.mask.window

    @lazy
    def _first_columns(self) -> Tensor:
        """(batch or 1,) int64: the column of each sample's first token; it may stand outside those
        there are."""
        if self.mask.starts is None:
            return torch.full((1,), -self.mask.k_start, dtype=torch.int64, device=self.device)
        return self.mask.starts.to(device=self.device, dtype=torch.int64) - self.mask.k_start

    @lazy
    def _kept_columns(self) -> tuple[int, int]:
        """Columns outside which no sample's kept keys stand; on a GPU, where looking at `starts`
        would wait, all."""
        if self.mask.starts is None:
            low = high = -self.mask.k_start
        elif not may_look(self.device):
            return 0, self.lk
        else:
            low, high = (int(x) for x in self._first_columns.aminmax()) if self.batch else (0, 0)
        return max(0, low), min(self.lk, high + self.keep_first)

    def kept(self, bs: slice, columns: Tensor) -> Tensor:
        """(batch or 1, …) bool: the column is one of the sample's kept keys; columns (…) or (batch,
        …)."""
        first = self._first_columns
        first = first[bs] if len(first) > 1 else first
        first = first.view(-1, *[1] * max(columns.ndim - 1, 1))
        return (columns >= first) & (columns < first + self.keep_first)

    @lazy
    def kept_from(self) -> Tensor | None:
        """(batch,) int32: the column of each sample's first kept key, which may stand outside those
        there are; None where none is kept beyond the window."""
        if not self.keep_first:
            return None
        first = self._first_columns.clamp(-(1 << 30), 1 << 30).to(torch.int32)
        return first.expand(self.batch).contiguous()

    @lazy
    def padded(self) -> tuple[int, int]:
        """Padding is usually at one end: only the columns that are padding somewhere need masking;
        on a GPU, where looking for them would wait for the device, all."""
        if self.keys is not None and not may_look(self.device):
            return 0, self.lk
        columns = torch.empty(0) if self.keys is None else (~self.keys).any(0).nonzero()
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)

    @property
    def offset(self) -> int:
        """The column at which the first row stands."""
        return self.mask.q_start - self.mask.k_start

    @staticmethod
    def _check(name: str, value: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
        if value is not None and tuple(value.shape) not in shapes:
            raise ValueError(
                f"mask.{name} has shape {tuple(value.shape)}, expected "
                f"{' or '.join(map(str, shapes))}."
            )

    def q_slots(self, r0: int, r1: int) -> Tensor:
        """(rows,) int64 sequence slots of the query rows."""
        return torch.arange(r0, r1, device=self.device) + self.mask.q_start

    def k_slots(self, c0: int, c1: int) -> Tensor:
        """(columns,) int64 sequence slots of the key columns."""
        return torch.arange(c0, c1, device=self.device) + self.mask.k_start

    def span(self, r0: int, r1: int) -> tuple[int, int]:
        """Columns that some row of r0:r1 may see, by causality and window, and what lies between
        them and the keys kept beyond it; (0, 0) if none."""
        first, last = (
            self.mask.q_start + r0 - self.mask.k_start,
            self.mask.q_start + r1 - 1 - self.mask.k_start,
        )
        lo, hi, window = 0, self.lk, self.mask.window
        if self.mask.causal:
            hi = min(hi, last + 1)
        elif window is not None:
            hi = min(hi, last + window)
        if window is not None:
            lo = max(lo, first - window + 1)
        if self.keep_first:
            a, b = self._kept_columns
            b = min(b, last + 1) if self.mask.causal else b
            if a < b:
                lo, hi = (min(lo, a), max(hi, b)) if lo < hi else (a, b)
        return (lo, hi) if lo < hi else (0, 0)

    def _edges(self, r0: int, r1: int, c0: int, c1: int) -> list[tuple[int, int]]:
        """Column ranges inside c0:c1 that some, but not all, rows see: the only ones where geometry
        needs a mask."""
        first, last = (
            self.mask.q_start + r0 - self.mask.k_start,
            self.mask.q_start + r1 - 1 - self.mask.k_start,
        )
        inner0, inner1, window = c0, c1, self.mask.window
        if self.mask.causal:
            inner1 = min(inner1, first + 1)
        elif window is not None:
            inner1 = min(inner1, first + window)
        if window is not None:
            inner0 = max(inner0, last - window + 1)
        if inner0 >= inner1:
            return [(c0, c1)]
        return [(a, b) for a, b in ((c0, inner0), (inner1, c1)) if a < b]

    def all_seen(self, r0: int, r1: int, c0: int, c1: int) -> bool:
        """Every row sees every column, as far as one may tell without looking at a tensor."""
        compact = self.keys is None and self.mask.dense is None
        return compact and not self._edges(r0, r1, c0, c1)

    def geometry(self, bs: slice, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """(batch or 1, 1, rows, columns) bool: seen by causality, window and `keep_first` alone.
        Not to be written to: where it stands on the diagonal as the last one did, it is that."""
        if self.keep_first:
            return self._geometry(bs, r0, r1, c0, c1)
        return self._again("geometry", r0, r1, c0, c1, lambda: self._geometry(bs, r0, r1, c0, c1))

    def _again(
        self, what: Hashable, r0: int, r1: int, c0: int, c1: int, make: Callable[[], Tensor]
    ) -> Tensor:
        """A mask that hangs on rows less columns alone: the last one, where it was of the same, and
        is small enough to be kept."""
        if (r1 - r0) * (c1 - c0) > _KEPT:
            return make()
        key, found = (r0 - c0, r1 - r0, c1 - c0), self._last.get(what)
        if found is None or found[0] != key:
            self._last[what] = found = key, make()
        return found[1]

    def _geometry(self, bs: slice, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        distance = (self.q_slots(r0, r1)[:, None] - self.k_slots(c0, c1))[None, None]
        seen = distance >= 0 if self.mask.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.mask.window is None:
            return seen
        near = distance.abs() < self.mask.window
        if self.keep_first:
            near = near | self.kept(bs, torch.arange(c0, c1, device=self.device))[:, None, None]
        return seen & near

    def _dense(self, bs: slice, hs: slice, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        dense = self.mask.dense
        assert dense is not None
        dense = dense[bs] if dense.shape[0] > 1 else dense
        dense = dense[:, hs] if dense.shape[1] > 1 else dense
        return dense[:, :, r0:r1, c0:c1].to(self.device)

    def visible(self, bs: slice, hs: slice, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """(batch or 1, heads or 1, rows, columns) bool."""
        seen = self.geometry(bs, r0, r1, c0, c1)
        if self.keys is not None:
            seen = seen & self.keys[bs, None, None, c0:c1]
        if self.mask.dense is not None:
            dense = self._dense(bs, hs, r0, r1, c0, c1)
            seen = seen & (dense if dense.dtype == torch.bool else bias_visible(dense))
        return seen

    def hide_(
        self, logits: Tensor, bs: slice, hs: slice, r0: int, r1: int, c0: int, c1: int
    ) -> Tensor:
        """Adds a dense bias and writes INVISIBLE over unseen keys, in place; logits (batch, heads,
        rows, columns)."""
        if self.mask.dense is not None:
            dense = self._dense(bs, hs, r0, r1, c0, c1)
            if dense.dtype == torch.bool:
                logits.masked_fill_(~dense, INVISIBLE)
            else:
                logits.add_(dense.to(logits.dtype)).masked_fill_(~bias_visible(dense), INVISIBLE)
        if self.keys is not None:
            a, b = max(self.padded[0], c0), min(self.padded[1], c1)
            if a < b:
                logits[..., a - c0 : b - c0].masked_fill_(
                    ~self.keys[bs, None, None, a:b], INVISIBLE
                )
        for a, b in self._edges(r0, r1, c0, c1):
            logits[..., a - c0 : b - c0].masked_fill_(~self.geometry(bs, r0, r1, a, b), INVISIBLE)
        return logits

    def row_set(self, which: Tensor | None = None) -> Tensor:
        """(batch, queries) bool: real rows, and in `which` if given."""
        rows = (
            torch.ones(self.batch, self.lq, dtype=torch.bool, device=self.device)
            if self.rows is None
            else self.rows
        )
        return rows if which is None else rows & which.to(device=self.device, dtype=torch.bool)

    def row_counts(self) -> Tensor:
        """(batch, queries) how many keys each row sees; compact masks only. O(L), by prefix sums
        over the keys."""
        assert self.mask.dense is None
        keys = (
            torch.ones(self.batch, self.lk, dtype=torch.bool, device=self.device)
            if self.keys is None
            else self.keys
        )
        slots, window = self.q_slots(0, self.lq) - self.mask.k_start, self.mask.window
        lo = torch.zeros_like(slots) if window is None else slots - window + 1
        hi = torch.full_like(slots, self.lk - 1) if window is None else slots + window - 1
        hi = torch.minimum(hi, slots) if self.mask.causal else hi
        counts = _interval_counts(keys, lo, hi)
        if not self.keep_first:
            return counts
        first = self._first_columns[:, None]
        last = first + (self.keep_first - 1)
        last = torch.minimum(last, slots) if self.mask.causal else last.expand(-1, self.lq)
        first = first.expand_as(last)
        both = _interval_counts(keys, torch.maximum(lo, first), torch.minimum(hi, last))
        return counts + _interval_counts(keys, first, last) - both

    def key_counts(self, question: Received, chunk: int = 256) -> Tensor:
        """(batch, 1, keys) int64: counted queries of the question that see each key ((batch, heads,
        keys) if the dense mask differs by head). By prefix sums over the queries; in chunks of rows
        for a dense mask."""
        rows, mask = self.row_set(question.queries), self.mask
        if mask.dense is None:
            slots = self.k_slots(0, self.lk) - mask.q_start  # rows that stand where the keys do
            lo, hi = torch.full_like(slots, 0), torch.full_like(slots, self.lq - 1)
            if mask.causal:
                lo = torch.maximum(lo, slots)
            if mask.window is not None:
                far = (lo, hi)
                lo, hi = (
                    torch.maximum(lo, slots - mask.window + 1),
                    torch.minimum(hi, slots + mask.window - 1),
                )
                if self.keep_first:
                    kept = self.kept(slice(None), torch.arange(self.lk, device=self.device))
                    lo, hi = torch.where(kept, far[0], lo), torch.where(kept, far[1], hi)
            if question.band is not None:
                lo, hi = (
                    torch.maximum(lo, slots + question.band[0]),
                    torch.minimum(hi, slots + question.band[1]),
                )
            counts = _interval_counts(rows, lo, hi)
            return (counts if self.keys is None else counts * self.keys)[:, None]
        total = torch.zeros(
            self.batch, mask.dense.shape[1], self.lk, dtype=torch.int64, device=self.device
        )
        for r0 in range(0, self.lq, chunk):
            r1 = min(r0 + chunk, self.lq)
            seen = (
                self.visible(slice(None), slice(None), r0, r1, 0, self.lk)
                & rows[:, None, r0:r1, None]
            )
            if question.band is not None:
                seen = seen & self.band(question.band, r0, r1, 0, self.lk)
            total += seen.sum(-2)
        return total

    def band(self, band: tuple[int, int], r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """(rows, columns) bool: the query stands between k+a and k+b inclusive. Not to be written
        to, as `geometry`."""

        def make() -> Tensor:
            distance = self.q_slots(r0, r1)[:, None] - self.k_slots(c0, c1)
            return (distance >= band[0]) & (distance <= band[1])

        return self._again(band, r0, r1, c0, c1, make)


def _interval_counts(flags: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """(batch, n) how many of flags (batch, m) are set in each inclusive interval lo…hi, (n,) or
    (batch or 1, n), cut to 0…m−1."""
    batch, size = flags.shape
    sums = torch.nn.functional.pad(flags.long().cumsum(1), (1, 0))
    start, stop = lo.clamp(0, size).expand(batch, -1), (hi + 1).clamp(0, size).expand(batch, -1)
    return (sums.gather(1, stop) - sums.gather(1, start)).clamp_min(0)
