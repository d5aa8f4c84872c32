"""What is asked of attention calls: statistics of their weights, in absolute slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.weight_rows import WeightRows
from interp_kernels import Received, Request

ROW = ("entropy", "max", "argmax", "distance", "capped_distance", "group_mass")
NAMES = (*ROW, "received", "pair_mass", "topk", "value_norm", "gate", "key_mass")


@dataclass(frozen=True)
class Question:
    """The statistics wanted of each attention call.

    All indices are absolute slots of the padded sequence.

    Args:
        names: of `ROW` plus "value_norm" (‖v‖₂, (batch, kv_heads, keys)), "key_mass" (Σ_k A, 1 less
            the share of a learned sink) and "gate" (mean of the output gate over a head's
            dimensions, where `Site.output_gate`).
        pairs: name → (batch, queries or 1, m) slots, −1 for none.
        received: name → `Received` with queries (batch or 1, slots).
        labels: (batch or 1, slots), negative = no group.
        n_groups: how many groups the labels name.
        cap: of the capped distance, in tokens.
        topk: how many of the largest weights; 0 for none.
        z: also hand over the per-head output (batch, queries, heads, d).
        call: also the attention call itself, as it came.
        weights: also the attention weights themselves, rows at a time (`WeightRows`).

    Example:
        >>> seen = []
        >>> with model.watch(Question(frozenset({"max"}), z=True), seen.append):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> seen[2].max.shape, seen[2].z.shape
        (torch.Size([1, 8, 8]), torch.Size([1, 8, 8, 32]))
    """

    names: frozenset[str] = frozenset()
    pairs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    received: Mapping[str, Received] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    n_groups: int = 0
    cap: int = 10
    topk: int = 0
    z: bool = False
    call: bool = False
    weights: WeightRows | None = None

    def at(self, site: Site) -> Question:
        """What is asked at a site: of a plain question, the question itself."""
        return self

    def __or__(self, other: Question) -> Question:
        """Both questions in one. The same pair or received name must mean the same thing in
        both."""
        if self.labels is not None and other.labels is not None and self.labels is not other.labels:
            raise TapError(
                "Two questions in one pass have different key labels; observe them in nested "
                "blocks."
            )
        if self.cap != other.cap and {"capped_distance"} <= self.names & other.names:
            raise TapError(
                "Two questions in one pass cap the distance differently; observe them in nested "
                "blocks."
            )
        if self.weights is not None and other.weights is not None:
            raise TapError(
                "Two questions in one pass want the weights themselves; observe them in nested "
                "blocks."
            )
        return Question(
            self.names | other.names,
            {**self.pairs, **other.pairs},
            {**self.received, **other.received},
            self.labels if self.labels is not None else other.labels,
            max(self.n_groups, other.n_groups),
            self.cap if "capped_distance" in self.names else other.cap,
            max(self.topk, other.topk),
            self.z or other.z,
            self.call or other.call,
            self.weights or other.weights,
        )

    def request(self, call: AttentionCall) -> Request:
        """This question in the coordinates of one call: rows and columns instead of slots. What is
        asked of the text's tokens (labels, pairs, sets of queries) is left out in a vision
        tower."""
        if call.site.tower == "vision":
            all_rows = {name: r for name, r in self.received.items() if r.queries is None}
            names, labels = self.names & set(ROW) - {"group_mass"}, None
            if "key_mass" in self.names:  # all keys are one group
                names, shape = names | {"group_mass"}, (call.batch, call.n_keys)
                labels = torch.zeros(shape, dtype=torch.int64, device=call.value.device)
            return Request(
                names,
                labels,
                int(labels is not None),
                received=all_rows,
                cap=self.cap,
                topk=self.topk,
            )
        return self.whole_request(call)

    def whole_request(self, call: AttentionCall) -> Request:
        """As `request`, with nothing left out: for a question that was made for this tower."""
        if call.notes is not None:
            return call.notes.request(self, call, self._asked)
        return self._asked(call)

    def _asked(self, call: AttentionCall) -> Request:
        q0, nq, k0, nk = call.mask.q_start, call.n_queries, call.mask.k_start, call.n_keys
        pairs = {}
        for name, index in self.pairs.items():
            index = _samples(index, call, f"pairs[{name!r}]")
            rows = index if index.shape[1] == 1 else _slice(index, 1, q0, nq, -1)
            column = rows - k0
            pairs[name] = torch.where((rows >= 0) & (column >= 0) & (column < nk), column, -1).to(
                call.value.device
            )
        received = {name: _set(r, call, name) for name, r in self.received.items()}
        labels = self.labels
        if labels is not None:
            labels = _rows(_slice(_samples(labels, call, "labels"), 1, k0, nk, -1), call)
        names, groups = self.names & set(ROW), self.n_groups
        if "key_mass" in self.names:  # the keys of no group are one more, and all groups are summed
            names, groups = names | {"group_mass"}, groups + 1
            labels = (
                torch.zeros(call.batch, nk, dtype=torch.int64, device=call.value.device)
                if labels is None
                else torch.where(labels < 0, groups - 1, labels)
            )
        return Request(names, labels, groups, pairs, received, self.cap, self.topk)


@dataclass(frozen=True)
class SiteQuestion(Question):
    """A question that depends on where it is asked: `choose(site)` at each attention call. `names`,
    `z` and `call` are those of all its questions together."""

    choose: Callable[[Site], Question] = lambda site: Question()

    def at(self, site: Site) -> Question:
        return self.choose(site)

    def request(self, call: AttentionCall) -> Request:
        return self.choose(call.site).whole_request(call)


def _samples(tensor: torch.Tensor, call: AttentionCall, what: str) -> torch.Tensor:
    """(batch or 1, …): what is asked of each sample of the prompt, for the rows of the call; under
    beams and `num_return_sequences` a sample's own is repeated. Raises `TapError`."""
    rows = call.rows_of(tensor)
    if rows is not None:
        return rows
    raise TapError(
        f"{what} is for {len(tensor)} samples, and layer {call.site.layer} attends in a batch of "
        f"{call.batch}; give a row for each sample, or one for all."
    )


def _set(asked: Received, call: AttentionCall, name: str) -> Received:
    """A set of queries (and keys) in the coordinates of one call."""
    what = f"received[{name!r}]"
    if asked.queries is not None:
        queries = _samples(asked.queries, call, what)
        rows = _slice(queries, 1, call.mask.q_start, call.n_queries, False)
        asked = replace(asked, queries=_rows(rows, call))
    if asked.keys is not None:
        asked = replace(asked, keys=_samples(asked.keys, call, what))
    return asked


def _rows(tensor: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """(batch or 1, slots) for each sample of the call."""
    return tensor.to(call.value.device).expand(call.batch if len(tensor) == 1 else -1, -1)


def _slice(tensor: torch.Tensor, dim: int, start: int, length: int, fill: Any) -> torch.Tensor:
    """`tensor[start : start+length]` along `dim`, filled up where the prompt's tensor ends
    (generated tokens)."""
    part = tensor.narrow(
        dim, min(start, tensor.shape[dim]), max(0, min(length, tensor.shape[dim] - start))
    )
    missing = length - part.shape[dim]
    if missing:
        shape = list(part.shape)
        shape[dim] = missing
        part = torch.cat([part, part.new_full(shape, fill)], dim)
    return part
