"""What is asked of attention calls: statistics of their weights, in absolute slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_kernels import Received, Request

ROW = ("entropy", "max", "argmax", "distance", "capped_distance", "group_mass")
NAMES = (*ROW, "received", "pair_mass", "topk", "value_norm", "gate")


@dataclass(frozen=True)
class Question:
    """The statistics wanted of each attention call.

    All indices are absolute slots of the padded sequence.

    Args:
        names: of `ROW` plus "value_norm" (‖v‖₂, (batch, kv_heads, keys)) and "gate" (mean of the
            output gate over a head's dimensions, where `Site.output_gate`).
        pairs: name → (batch, queries or 1, m) slots, −1 for none.
        received: name → `Received` with queries (batch or 1, slots).
        labels: (batch or 1, slots), negative = no group.
        n_groups: how many groups the labels name.
        cap: of the capped distance, in tokens.
        topk: how many of the largest weights; 0 for none.
        z: also hand over the per-head output (batch, queries, heads, d).
        call: also the attention call itself, as it came.

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
        )

    def request(self, call: AttentionCall) -> Request:
        """This question in the coordinates of one call: rows and columns instead of slots. What is
        asked of the text's tokens (labels, pairs, sets of queries) is left out in a vision
        tower."""
        if call.site.tower == "vision":
            all_rows = {name: r for name, r in self.received.items() if r.queries is None}
            return Request(
                self.names & set(ROW) - {"group_mass"},
                received=all_rows,
                cap=self.cap,
                topk=self.topk,
            )
        return self.whole_request(call)

    def whole_request(self, call: AttentionCall) -> Request:
        """As `request`, with nothing left out: for a question that was made for this tower."""
        q0, nq, k0, nk = call.mask.q_start, call.n_queries, call.mask.k_start, call.n_keys
        pairs = {}
        for name, index in self.pairs.items():
            rows = index if index.shape[1] == 1 else _slice(index, 1, q0, nq, -1)
            column = rows - k0
            pairs[name] = torch.where((rows >= 0) & (column >= 0) & (column < nk), column, -1).to(
                call.value.device
            )
        received = {
            name: r
            if r.queries is None
            else replace(r, queries=_rows(_slice(r.queries, 1, q0, nq, False), call))
            for name, r in self.received.items()
        }
        labels = None if self.labels is None else _rows(_slice(self.labels, 1, k0, nk, -1), call)
        names = self.names & set(ROW)
        return Request(names, labels, self.n_groups, pairs, received, self.cap, self.topk)


@dataclass(frozen=True)
class SiteQuestion(Question):
    """A question that depends on where it is asked: `choose(site)` at each attention call. `names`,
    `z` and `call` are those of all its questions together."""

    choose: Callable[[Site], Question] = lambda site: Question()

    def at(self, site: Site) -> Question:
        return self.choose(site)

    def request(self, call: AttentionCall) -> Request:
        return self.choose(call.site).whole_request(call)


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
