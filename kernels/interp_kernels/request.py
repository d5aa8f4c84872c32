"""What an attention call is, what may be asked about it, and what comes back. Shapes as comments,
no models."""

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
    conditions hold:

    * ``causal``: k_slot ≤ q_slot;
    * ``window = w``: |q_slot − k_slot| < w (one-sided when causal);
      With ``keep_first = n`` the first n tokens of each sample stay visible beyond it, and
      causality and padding allow for them: keys at slots ``starts[b]`` … starts[b] + n − 1, where
      ``starts`` (batch,) int is the slot of each sample's first real token (None: 0). Without a
      window it means nothing;
    * ``keys[b, j]``: the key is a real token, not padding — (batch, keys) bool;
    * ``dense``: (batch or 1, heads or 1, queries, keys) bool (True = visible) or a float bias added
      to the logits.

    ``queries`` (batch, queries) bool says which rows are real tokens: the statistics of the others
    are 0 and they do not count in ``received``; their output is computed all the same.
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
    """A question to the columns: attention a key receives from the queries that see it and are in
    the set.

    queries: (batch, queries) bool, None for all; band (a, b): only queries at slots k+a … k+b
    inclusive. reduce: the mean over those queries, their sum, or the largest. keys: (batch or 1,
    heads or 1, n) int columns, −1 for none: only these, and the answer is (batch, heads, n), 0 for
    −1. A set that leaves out most queries, or asks for few keys, is cheaper in proportion on the
    fused route.
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

    * ``entropy`` −Σ_k A ln A in nats; ``max`` max_k A; ``argmax`` the key *column* of the max,
      int64, −1 where the
      row sees nothing (lowest column on ties); ``distance`` Σ_k A·|q_slot − k_slot| in tokens;
      ``capped_distance`` the same with min(·, cap). With sink logits A is sub-stochastic and these
      are sums over real keys only (entropy −Σ_keys A ln A; nothing is renormalised).
    * ``group_mass`` Σ_{k: label(k)=g} A for g < n_groups ≤ 16, (batch, heads, queries, groups);
      labels (batch,
      keys) int, negative = no group.
    * ``pair_mass`` per named index (batch, queries, m) int of key columns, −1 for none: Σ of A over
      them.
    * ``received`` per named set: (batch, heads, keys), 0 where no counted query sees the key; and
      ``received_count`` (batch, 1, keys), how many queries were averaged.
    * ``topk``: positions (columns, int64, −1 where fewer keys are visible) and probabilities of the
      k largest
      weights, (batch, heads, queries, k). ``topk_rows`` (m,) int: only of these query rows, (batch,
      heads, m, k); in a long prompt they are a pass of their own, as cheap as m decode steps side
      by side.
    * ``out`` False: the output is not needed, and may come back without columns; the streaming
      route then leaves V
      alone. ``lse`` False: nobody reads the log-sum-exp, and it may come as a rule leaves it (one
      that renormalises is then a bias on the logits).
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
    """out (batch, heads, queries, d_v) in v's dtype (d_v may be 0 where the request has no need of
    it); lse (batch, heads, queries) float32 (natural log, −inf where nothing is visible; includes
    the sink logit if there is one; an edit's temper and bias count, its rule, blend and gain do
    not; ln Σ σ under steer.sigmoid); stats by name, `pair_mass:<name>`, `received:<name>`,
    `received_count:<name>`, `topk_index`, `topk_prob`."""

    out: torch.Tensor
    lse: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
