"""Kernel benchmarks: inputs of one shape, runs and rows of the table, errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp_kernels import Mask, Result, Rule
from interp_kernels.call import Call, prepare
from interp_kernels.fused.forward import State, forward
from interp_kernels.steer import factors

#: ACT: a key is a sink if it receives more than ALPHA / length on average; a sink keeps BETA of
#: what it gets.
ALPHA, BETA = 5.0, 0.4
GROUPS, CAP, TOPK = 16, 10, 10
#: Relative error, ‖got − want‖ / ‖want‖, above which 16-bit outputs and float32 statistics are
#: plainly wrong; the tests are stricter.
OUT_ERROR, STATISTIC_ERROR = 2e-2, 1e-2
CUDNN, FLASH, PLAIN = "cuDNN", "FlashAttention", "plain forward"
EAGER_LENGTH = 8192


@dataclass(frozen=True)
class Shape:
    """One attention call of a benchmark."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16


class Inputs:
    """The tensors of one length, and what float64 says about sampled rows of them."""

    def __init__(self, length: int, shape: Shape, device: torch.device):
        self.length, self.shape, self.device = length, shape, device
        self.scale, self.mask = shape.dim**-0.5, Mask()
        self.generator = torch.Generator(device).manual_seed(length)
        self.q = self.random(shape.heads)
        self.k, self.v = self.random(shape.kv_heads), self.random(shape.kv_heads)

    def random(self, heads: int, length: int | None = None) -> Tensor:
        """(1, heads, length, dim) normal numbers in a model's layout."""
        size = (1, length or self.length, heads, self.shape.dim)
        return torch.randn(
            size, generator=self.generator, device=self.device, dtype=self.shape.dtype
        ).transpose(1, 2)

    def integers(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.generator, device=self.device)

    @cached_property
    def lse(self) -> Tensor:
        return forward(self.call).lse

    @property
    def call(self) -> Call:
        """Plain causal attention of these tensors."""
        return prepare(self.q, self.k, self.v)

    @cached_property
    def group_labels(self) -> Tensor:
        return self.integers(GROUPS, 1, self.length).to(torch.int32)

    def scattered(self, count: int) -> Tensor:
        """(1, heads, length) uint8: `count` keys a head, at random, are 1."""
        noise = torch.rand(
            self.shape.heads, self.length, generator=self.generator, device=self.device
        )
        chosen = noise.topk(min(count, self.length // 2), dim=-1).indices
        labels = torch.zeros(
            1, self.shape.heads, self.length, dtype=torch.uint8, device=self.device
        )
        return labels.scatter_(-1, chosen[None], 1)

    @property
    def samples(self) -> Iterator[tuple[int, int]]:
        """(head, row or column)."""
        for head in (0, self.shape.heads - 1):
            for i in (0, 1, self.length // 3, self.length - 1):
                yield head, i

    def values(self, head: int) -> Tensor:
        return self.v[0, head // (self.shape.heads // self.shape.kv_heads)].double()

    def logits(self, head: int, row: int) -> Tensor:
        """(row + 1,) float64."""
        keys = self.k[0, head // (self.shape.heads // self.shape.kv_heads), : row + 1].double()
        return self.scale * (keys @ self.q[0, head, row].double())

    def column(self, head: int, key: int) -> Tensor:
        """(length − key,) float64: the weights that rows from `key` on give to it, by our
        log-sum-exp."""
        k = self.k[0, head // (self.shape.heads // self.shape.kv_heads), key].double()
        logits = self.scale * (self.q[0, head, key:].double() @ k)
        return (logits - self.lse[0, head, key:].double()).exp()

    @property
    def flops(self) -> float:
        """Of a causal forward: two products, half of the square."""
        return 2.0 * self.length**2 * self.shape.dim * self.shape.heads

    @property
    def bytes(self) -> float:
        """q, k, v read and the output written, once."""
        return (
            2.0
            * self.length
            * self.shape.dim
            * (self.shape.heads + self.shape.kv_heads)
            * self.q.element_size()
        )

    @property
    def cache(self) -> float:
        """Bytes of k and v."""
        return 2.0 * self.length * self.shape.dim * self.shape.kv_heads * self.k.element_size()


@dataclass
class Run:
    """What is timed. calls: one, or several on different data that are replayed as a graph; check:
    the result → the worst error relative to what is allowed; flops, bytes: of the floor; note: goes
    into the row."""

    calls: Sequence[Callable[[], Any]]
    check: Callable[[Any], float] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    note: str = ""
    graph: bool = False


@dataclass(frozen=True)
class Case:
    """A row a length. of: the row it is compared with, or a rate its floor is a share of."""

    name: str
    make: Callable[[Inputs], Run]
    of: str = ""
    bar: float | None = None
    goal: float | None = None
    lengths: Sequence[int] = (32768, 131072)
    bar_lengths: Sequence[int] = (32768, 131072)


# --- errors against float64
# -----------------------------------------------------------------------------------


def error(got: Tensor, want: Tensor, allowed: float, least: float = 1e-3) -> float:
    """‖got − want‖ / max(‖want‖, least) in units of what is allowed; infinite where something is
    not a number."""
    got, want = got.double().flatten(), want.double().flatten()
    found = float((got - want).norm() / want.norm().clamp_min(least)) / allowed
    return found if found == found else float("inf")


def check_state(x: Inputs, names: Sequence[str], state: State | Result) -> float:
    """A plain causal state and its statistics."""
    worst = (
        0.0
        if bool(torch.isfinite(state.out).all() & torch.isfinite(state.lse).all())
        else float("inf")
    )
    for head, i in x.samples:
        logits = x.logits(head, i)
        lse = logits.logsumexp(0)
        a = (logits - lse).exp()
        away = i - torch.arange(i + 1, device=x.device, dtype=torch.float64)
        hot = torch.nn.functional.one_hot(x.group_labels[0, : i + 1].long(), GROUPS).double()
        want = dict(
            entropy=-(a * (logits - lse)).sum(),
            max=a.max(),
            argmax=a.max(),
            distance=(a * away).sum(),
            capped_distance=(a * away.clamp_max(CAP)).sum(),
            group_mass=a @ hot,
        )
        worst = max(worst, error(state.out[0, head, i], a @ x.values(head)[: i + 1], OUT_ERROR))
        worst = max(worst, float((state.lse[0, head, i].double() - lse).abs()) / STATISTIC_ERROR)
        for name in names:
            got = state.stats[name][0, head, i]
            if name == "argmax":  # rounding may choose a neighbour that is as large
                got = a[got.clamp(0, i)]
            worst = max(worst, error(got, want[name], STATISTIC_ERROR))
    return worst


def check_rule(x: Inputs, labels: Tensor, rule: Rule, out: Tensor) -> float:
    """A plain causal output under `rule` over labels (1, heads or 1, keys)."""
    worst = 0.0 if bool(torch.isfinite(out).all()) else float("inf")
    labels = labels.long().expand(1, x.shape.heads, -1)
    for head, i in x.samples:
        a = x.logits(head, i).softmax(0)
        group = labels[0, head, : i + 1]
        mass = a.new_zeros(rule.groups).index_add(0, group, a)
        a = a * factors(mass[None, None, None], rule)[0, 0, 0][group]
        worst = max(worst, error(out[0, head, i], a @ x.values(head)[: i + 1], OUT_ERROR))
    return worst


def check_received(
    x: Inputs, got: Tensor, rows: Tensor | None = None, total: bool = False
) -> float:
    """Means (or sums) of columns, over the rows (1, length) bool."""
    worst = 0.0 if bool(torch.isfinite(got).all()) else float("inf")
    for head, j in x.samples:
        column = x.column(head, j)
        if rows is not None:
            column = column[rows[0, j:]]
        want = column.sum() if total else column.sum() / max(1, len(column))
        worst = max(worst, error(got[0, head, j], want, STATISTIC_ERROR, least=1e-12))
    return worst
