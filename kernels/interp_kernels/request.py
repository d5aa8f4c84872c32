"""Which keys a call's queries see, which statistics are wanted, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees, in O(L) memory unless `dense` is given.

    Query row i stands at slot ``q_start + i`` and key column j at slot ``k_start + j`` of the
    (padded) sequence; a sliding-window cache has ``k_start > 0``. A key is visible if all given
    conditions hold. A field that does not fit a call is a `ValueError` of that call.

    Args:
        causal: k_slot ≤ q_slot.
        window: |q_slot − k_slot| < window (one-sided when causal).
        q_start: slot of the first query row.
        k_start: slot of the first key column.
        keys: (batch, keys) bool: the key is a real token, not padding.
        queries: (batch, queries) bool: which rows are real tokens. The statistics of the others are
            0 and they do not count in ``received``; their output is computed all the same.
        dense: (batch or 1, heads or 1, queries, keys) bool (True = visible) or a float bias added
            to the logits.
        keep_first: the first so many tokens of each sample stay visible beyond the window;
            causality and padding allow for them. Without a window it means nothing.
        starts: (batch,) int, the slot of each sample's first real token, which `keep_first` counts
            from (None: 0): keys at slots ``starts[b]`` … starts[b] + keep_first − 1.

    Example:
        >>> from interp_kernels import visible
        >>> visible(Mask(window=2), 1, 3, 3, torch.device("cpu"))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """

    causal: bool = True
    window: int | None = None
    q_start: int = 0
    k_start: int = 0
    keys: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    keep_first: int = 0
    starts: torch.Tensor | None = None


@dataclass(frozen=True)
class Received:
    """Attention a key receives from the queries that see it and are in a set.

    A set that leaves out most queries, or asks for few keys, is cheaper in proportion on the fused
    route. A field that does not fit a call is a `ValueError` of that call.

    Args:
        queries: (batch, queries) bool, None for all.
        band: (a, b): only queries at slots k+a … k+b inclusive.
        reduce: the mean over those queries, their sum, or the largest.
        keys: (batch or 1, heads or 1, n) int columns, −1 for none: only these, and the answer is
            (batch, heads, n), 0 for −1.

    Example:
        >>> from interp_kernels import Request, attention
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> asked = Request(received={"all": Received(reduce="sum")})
        >>> attention(q, q, q, request=asked).stats["received:all"].flatten()
        tensor([1.5000, 0.5000])
    """

    queries: torch.Tensor | None = None
    band: tuple[int, int] | None = None
    reduce: Literal["mean", "sum", "max"] = "mean"
    keys: torch.Tensor | None = None


#: Row statistics, (batch, heads, queries) float32 unless said otherwise.
ROW = ("entropy", "max", "argmax", "distance", "capped_distance", "group_mass", "pair_mass")


@dataclass(frozen=True)
class Request:
    """Which statistics of A = softmax(logits) to compute.

    With sink logits A is sub-stochastic and the row statistics are sums over real keys only
    (entropy −Σ_keys A ln A; nothing is renormalised).

    Args:
        names: of `ROW`. ``entropy`` −Σ_k A ln A in nats; ``max`` max_k A; ``argmax`` the key
            *column* of the max, int64, −1 where the row sees nothing (lowest column on ties);
            ``distance`` Σ_k A·|q_slot − k_slot| in tokens; ``capped_distance`` the same with
            min(·, cap); ``group_mass`` Σ_{k: label(k)=g} A for g < n_groups ≤ 16, (batch, heads,
            queries, groups).
        labels: (batch, keys) int group of each key for ``group_mass``, negative = no group.
        n_groups: how many groups there are.
        pairs: named indices (batch, queries, m) int of key columns, −1 for none: ``pair_mass`` is Σ
            of A over them.
        received: named questions to the columns: (batch, heads, keys), 0 where no counted query
            sees the key; and ``received_count`` (batch, 1, keys), how many queries were averaged.
        cap: of ``capped_distance``.
        topk: columns (int64, −1 where fewer keys are visible) and probabilities of the k largest
            weights, (batch, heads, queries, k).
        topk_rows: (m,) int: only of these query rows, (batch, heads, m, k); in a long prompt they
            are a pass of their own, as cheap as m decode steps side by side.
        out: False: the output is not needed, and may come back without columns; V is then left
            alone, but for 16 of its dimensions in the kernels.
        lse: False: nobody reads the log-sum-exp, and it may come as a rule leaves it (one that
            renormalises is then a bias on the logits). With out False too, rows that no question
            counts may be left out of the pass.

    Raises:
        ValueError: for an unknown name, groups without labels, or rows without topk.

    Example:
        >>> from interp_kernels import attention
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> attention(q, q, q, request=Request(frozenset({"max"}))).stats["max"].flatten()
        tensor([1.0000, 0.5000])
    """

    names: frozenset[str] = frozenset()
    labels: torch.Tensor | None = None
    n_groups: int = 0
    pairs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    received: Mapping[str, Received] = field(default_factory=dict)
    cap: int = 10
    topk: int = 0
    topk_rows: torch.Tensor | None = None
    out: bool = True
    lse: bool = True

    def __post_init__(self) -> None:
        unknown = set(self.names) - set(ROW)
        if unknown:
            raise ValueError(f"Unknown statistics {sorted(unknown)}; there are {', '.join(ROW)}.")
        if "group_mass" in self.names and (self.labels is None or not 1 <= self.n_groups <= 16):
            raise ValueError("group_mass needs labels (batch, keys) and 1 to 16 groups.")
        if self.topk_rows is not None and not self.topk:
            raise ValueError("topk_rows says of which queries the topk keys are wanted; topk is 0.")

    def __bool__(self) -> bool:
        return bool(self.names or self.pairs or self.received or self.topk)

    @property
    def cheap(self) -> bool:
        """True if vendor attention plus a few exp(q·k − lse) serve it, without a pass over all
        keys."""
        return not self.names - {"pair_mass"} and not self.received and not self.topk


@dataclass
class Result:
    """Output, log-sum-exp and statistics of a call.

    out (batch, heads, queries, d_v) in v's dtype (d_v may be 0 where the request has no need of
    it); lse (batch, heads, queries) float32 (natural log, −inf where nothing is visible; includes
    the sink logit if there is one; an edit's temper and bias count, its rule, blend and gain do
    not; ln Σ σ under steer.sigmoid); stats by name, `pair_mass:<name>`, `received:<name>`,
    `received_count:<name>`, `topk_index`, `topk_prob`."""

    out: torch.Tensor
    lse: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
