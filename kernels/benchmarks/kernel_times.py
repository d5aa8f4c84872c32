"""Times of each kernel on a GPU, beside the vendors', FlexAttention's and the exact emulations', in the same run.

    python kernels/benchmarks/kernel_times.py [--lengths 32768,131072,8192] [--only NAME] [--again] [--tune]

A row is written when it is measured; the same command goes on where it stopped. --tune times configurations of the
kernels instead. (Not called kernels.py: transformers would take it for the package of that name.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import record
import specialised
import torch
from record import BANDWIDTH, NO_GPU, Record, Row, Skip, planned
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from interp_kernels import Mask, Received, Request, Result, Rule, Steer, attention, explain
from interp_kernels.fused import configs, vendor
from interp_kernels.fused import decode as decode_module
from interp_kernels.fused import received as received_module
from interp_kernels.fused.backend import DECODE_ROWS, top_rows
from interp_kernels.fused.decode import Decoded, decode
from interp_kernels.fused.forward import NAMES, State, forward
from interp_kernels.fused.received import received, sampled_blocks
from interp_kernels.masking import Visibility
from interp_kernels.steer import factors

WHAT = (
    "Causal prefill of one sequence, 32 query and 8 key-value heads of dimension 128, bf16, random data in a model's "
    "layout (batch, tokens, heads, dim). Every row is first checked on sampled rows and columns against float64, its "
    "outputs' memory poisoned with NaN before; then timed by CUDA events with the cache flushed, the medians of two "
    "rounds. floor_ms is the larger of FLOPs and bytes at the ceilings, which are what a large bf16 product and a copy "
    "reach. Decode steps are replayed as CUDA graphs over several caches; their ratio is the share of the bandwidth."
)
#: ACT: a key is a sink if it receives more than ALPHA / length on average; a sink keeps BETA of what it gets.
ALPHA, BETA = 5.0, 0.4
GROUPS, CAP, TOPK = 16, 10, 10
#: Relative error, ‖got − want‖ / ‖want‖, above which 16-bit outputs and float32 statistics are plainly wrong; the tests
#: are stricter.
OUT_ERROR, STATISTIC_ERROR = 2e-2, 1e-2
CUDNN, FLASH, PLAIN = "cuDNN", "FlashAttention", "plain forward"
EAGER_LENGTH = 8192
LENGTHS = (32768, 131072, EAGER_LENGTH)


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
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.shape.dtype).transpose(1, 2)

    def integers(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.generator, device=self.device)

    @cached_property
    def lse(self) -> Tensor:
        return forward(self.q, self.k, self.v, **self.plain).lse

    @property
    def plain(self) -> Row:
        """Arguments of a causal `forward`."""
        return dict(scale=self.scale, causal=True, offset=0)

    @cached_property
    def group_labels(self) -> Tensor:
        return self.integers(GROUPS, 1, self.length).to(torch.int32)

    def scattered(self, count: int) -> Tensor:
        """(1, heads, length) uint8: `count` keys a head, at random, are 1."""
        noise = torch.rand(self.shape.heads, self.length, generator=self.generator, device=self.device)
        chosen = noise.topk(min(count, self.length // 2), dim=-1).indices
        labels = torch.zeros(1, self.shape.heads, self.length, dtype=torch.uint8, device=self.device)
        return labels.scatter_(-1, chosen[None], 1)

    # --- float64 ---------------------------------------------------------------------------------------------

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
        """(length − key,) float64: the weights that rows from `key` on give to it, by our log-sum-exp."""
        k = self.k[0, head // (self.shape.heads // self.shape.kv_heads), key].double()
        logits = self.scale * (self.q[0, head, key:].double() @ k)
        return (logits - self.lse[0, head, key:].double()).exp()

    # --- floors ----------------------------------------------------------------------------------------------

    @property
    def flops(self) -> float:
        """Of a causal forward: two products, half of the square."""
        return 2.0 * self.length**2 * self.shape.dim * self.shape.heads

    @property
    def bytes(self) -> float:
        """q, k, v read and the output written, once."""
        return 2.0 * self.length * self.shape.dim * (self.shape.heads + self.shape.kv_heads) * self.q.element_size()

    @property
    def cache(self) -> float:
        """Bytes of k and v."""
        return 2.0 * self.length * self.shape.dim * self.shape.kv_heads * self.k.element_size()


@dataclass
class Run:
    """What is timed. calls: one, or several on different data that are replayed as a graph; check: the result → the
    worst error relative to what is allowed; flops, bytes: of the floor; note: goes into the row."""

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


# --- errors against float64 -----------------------------------------------------------------------------------


def error(got: Tensor, want: Tensor, allowed: float, least: float = 1e-3) -> float:
    """‖got − want‖ / max(‖want‖, least) in units of what is allowed; infinite where something is not a number."""
    got, want = got.double().flatten(), want.double().flatten()
    found = float((got - want).norm() / want.norm().clamp_min(least)) / allowed
    return found if found == found else float("inf")


def check_state(x: Inputs, names: Sequence[str], state: State | Result) -> float:
    """A plain causal state and its statistics."""
    worst = 0.0 if bool(torch.isfinite(state.out).all() & torch.isfinite(state.lse).all()) else float("inf")
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


def check_received(x: Inputs, got: Tensor, rows: Tensor | None = None, total: bool = False) -> float:
    """Means (or sums) of columns, over the rows (1, length) bool."""
    worst = 0.0 if bool(torch.isfinite(got).all()) else float("inf")
    for head, j in x.samples:
        column = x.column(head, j)
        if rows is not None:
            column = column[rows[0, j:]]
        want = column.sum() if total else column.sum() / max(1, len(column))
        worst = max(worst, error(got[0, head, j], want, STATISTIC_ERROR, least=1e-12))
    return worst


# --- ours -----------------------------------------------------------------------------------------------------


def act_rule(device: torch.device) -> Rule:
    """Group 1 keeps BETA of its mass, group 0 receives the rest in proportion."""
    return Rule(torch.tensor([[1.0, BETA]], device=device), torch.tensor([[1.0, 0.0]], device=device))


def statistics_run(names: Sequence[str], x: Inputs) -> Run:
    def call() -> State:
        grouped = dict(labels=x.group_labels, n_groups=GROUPS) if "group_mass" in names else {}
        return forward(x.q, x.k, x.v, **x.plain, names=names, cap=CAP, **grouped)

    per_row = sum(GROUPS if name == "group_mass" else 1 for name in names)
    extra = 4.0 * x.shape.heads * x.length * (per_row + 1)
    return Run([call], partial(check_state, x, names), x.flops, x.bytes + extra)


def received_run(share: int, x: Inputs) -> Run:
    """Column means over all queries, or over one of `share` blocks of queries."""
    x.lse  # noqa: B018 - computed before the clock runs
    rows = None if share == 1 else sampled_blocks(1, x.length, share, generator=x.generator, device=x.device)

    def call() -> Tensor:
        return received(x.q, x.k, x.lse, Received(queries=rows), mask=x.mask, scale=x.scale)[0]

    return Run([call], partial(check_received, x, rows=rows), x.flops / 2 / share, x.bytes / 2)


def routed(x: Inputs, steer: Steer) -> str:
    """The route that the dispatcher takes."""
    return explain(x.q, x.k, x.v, steer=steer, backend="triton")


def spans_run(spans: Callable[[int], tuple[tuple[int, int, int], ...]], x: Inputs) -> Run:
    rule = act_rule(x.device)
    steer = Steer(spans=spans(x.length), rule=rule)

    def call() -> Tensor:
        return attention(x.q, x.k, x.v, steer=steer, backend="triton").out

    labels = steer.labels_of(x.length, x.device)
    return Run([call], partial(check_rule, x, labels, rule), x.flops, x.bytes, routed(x, steer))


def scattered_run(count: int, x: Inputs) -> Run:
    rule, labels = act_rule(x.device), x.scattered(count)
    steer = Steer(labels=labels, rule=rule)

    def call() -> Tensor:
        return attention(x.q, x.k, x.v, steer=steer, backend="triton").out

    return Run([call], partial(check_rule, x, labels, rule), x.flops, x.bytes, routed(x, steer))


def lse_of(x: Inputs) -> Callable[[], Tensor]:
    """The cheapest log-sum-exp at hand: the vendor's, ours where there is none."""
    name, _ = vendor.name_of(x.q, x.k, x.v)
    if not name:
        return lambda: forward(x.q, x.k, x.v, **x.plain).lse
    call = vendor.flash(name, x.scale)
    return lambda: call(x.q, x.k, x.v, True, None)[1]


def act_run(share: int, x: Inputs) -> Run:
    """ACT with the search for its sinks, from every query or from one of `share` blocks of queries."""
    rule, find_lse = act_rule(x.device), lse_of(x)
    found: list[Tensor] = []

    def call() -> Tensor:
        rows = None if share == 1 else sampled_blocks(1, x.length, share, generator=x.generator, device=x.device)
        mean = received(x.q, x.k, find_lse(), Received(queries=rows), mask=x.mask, scale=x.scale)[0]
        sinks = mean > ALPHA / x.length
        sinks[..., 0] = False
        found[:] = [sinks]
        return attention(x.q, x.k, x.v, steer=Steer(labels=sinks.to(torch.uint8), rule=rule), backend="triton").out

    def check(out: Tensor) -> float:
        run.note = f"{float(found[0].sum(-1).double().mean()):.1f} sinks a head found"
        return check_rule(x, found[0], rule, out)

    # the log-sum-exp of the counted rows and their columns are half a forward each, the edit a whole one
    run = Run([call], check, (1 + 1 / share) * x.flops, x.bytes)
    return run


def decode_run(edited: bool, topk: int, whole: bool, x: Inputs) -> Run:
    """One query over a cache of `length` keys; several caches in turn, so that none stays in the L2 cache."""
    shape, rule = x.shape, act_rule(x.device)
    steer = Steer(spans=((0, 1, 1),), rule=rule) if edited else None
    mask = Mask(q_start=x.length - 1)
    copies = 1 if x.device.type != "cuda" else max(2, -(-512 * 2**20 // int(x.cache)))
    caches = [(x.random(shape.heads, 1), x.random(shape.kv_heads), x.random(shape.kv_heads)) for _ in range(copies)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Decoded | Result:
        if whole:
            return attention(q, k, v, mask=mask, steer=steer, request=Request(topk=topk), backend="triton")
        return decode(q, k, v, mask=mask, scale=x.scale, steer=steer, topk=topk)

    def check(got: Decoded | Result) -> float:
        q, k, v = (t.double() for t in caches[0])
        group = shape.heads // shape.kv_heads
        worst = 0.0
        for head in (0, shape.heads - 1):
            a = (x.scale * (k[0, head // group] @ q[0, head, 0])).softmax(0)
            before = a
            if steer is not None:
                mass = torch.stack([a[1:].sum(), a[0]])
                a = a * factors(mass[None, None, None], rule)[0, 0, 0][steer.labels_of(x.length, x.device)[0, 0]]
            worst = max(worst, error(got.out[0, head, 0], a @ v[0, head // group], OUT_ERROR))
            if topk:
                own = isinstance(got, Decoded)  # the kernel's are of the weights before the rule
                prob = got.topk_prob if isinstance(got, Decoded) else got.stats["topk_prob"]
                assert prob is not None
                worst = max(worst, error(prob[0, head, 0], (before if own else a).topk(topk).values, STATISTIC_ERROR))
        return worst

    calls = [partial(call, *cache) for cache in caches]
    flops = 4.0 * x.length * shape.dim * shape.heads
    return Run(calls, check, flops, x.cache, f"{copies} caches in turn, a CUDA graph", graph=True)


def prefill_topk_run(rows: int, x: Inputs) -> Run:
    """The strongest keys of the last `rows` queries, in one call."""
    rows = min(rows, x.length // 2)
    start = x.length - rows
    q, mask, request = x.q[:, :, start:], Mask(q_start=start), Request(topk=TOPK)

    def call() -> Result:
        return attention(q, x.k, x.v, mask=mask, request=request, backend="triton")

    def check(got: Result) -> float:
        want = x.logits(0, x.length - 1).softmax(0).topk(TOPK).values
        return error(got.stats["topk_prob"][0, 0, -1], want, STATISTIC_ERROR)

    return Run([call], check, 4.0 * x.length * rows * x.shape.dim * x.shape.heads, x.cache)


def scattered_topk_run(rows: int, x: Inputs) -> Run:
    """The strongest keys of `rows` chosen queries of the prompt, its log-sum-exp known: the separate pass."""
    chosen = TOPK + torch.randint(x.length - TOPK, (min(rows, x.length // 2),), generator=x.generator, device=x.device)
    vis = Visibility(x.mask, 1, x.shape.heads, x.length, x.length, x.device)
    request = Request(topk=TOPK, topk_rows=chosen)
    lse, last = x.lse, int(chosen[-1])

    def call() -> dict[str, Tensor]:
        return top_rows(x.q, x.k, x.v, lse, vis, x.scale, None, request, Steer())

    def check(got: dict[str, Tensor]) -> float:
        want = x.logits(0, last).softmax(0).topk(TOPK).values
        return error(got["topk_prob"][0, 0, -1], want, STATISTIC_ERROR)

    passes = -(-len(chosen) // DECODE_ROWS)  # each reads the cache once
    return Run([call], check, 4.0 * x.length * len(chosen) * x.shape.dim * x.shape.heads, passes * x.cache)


def specialised_run(variant: str, x: Inputs) -> Run:
    """The experiment of specialised.py: descriptors, warp specialisation."""

    def call() -> State:
        return State(*specialised.run(variant, x.q, x.k, x.v, x.scale))

    return Run([call], partial(check_state, x, ()), x.flops, x.bytes)


# --- others ---------------------------------------------------------------------------------------------------


def sdpa_run(backend: SDPBackend, x: Inputs) -> Run:
    """`scaled_dot_product_attention` forced to one backend; the CPU's own in a smoke test."""
    note, k, v = "", x.k, x.v
    if x.device.type == "cpu":
        backend = SDPBackend.FLASH_ATTENTION

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(x.q, k, v, is_causal=True, scale=x.scale, enable_gqa=grouped)

    grouped = True
    try:
        call()
    except RuntimeError:  # it does not take grouped heads
        grouped, times = False, x.shape.heads // x.shape.kv_heads
        k, v = (t.transpose(1, 2).repeat_interleave(times, 2).transpose(1, 2) for t in (x.k, x.v))
        note = "k and v repeated to all heads, outside the clock"
    return Run([call], partial(check_out, x), x.flops, x.bytes, note)


def check_out(x: Inputs, out: Tensor, bias: Tensor | None = None) -> float:
    """A plain causal output, or one with a bias (heads, keys)."""
    worst = 0.0
    for head, i in x.samples:
        logits = x.logits(head, i) + (0 if bias is None else bias[head, : i + 1].double())
        want = logits.softmax(0) @ x.values(head)[: i + 1]
        worst = max(worst, error(out[0, head, i], want, OUT_ERROR))
    return worst


def vendor_state_run(name: str, x: Inputs) -> Run:
    """The private call with its log-sum-exp, as the vendor route uses it."""
    call = vendor_call(x, name)
    return Run([lambda: State(*call(x.q, x.k, x.v))], partial(check_state, x, ()), x.flops, x.bytes)


def vendor_call(x: Inputs, name: str = "") -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A causal vendor call (q, k, v) → (out, lse) with scale 1 or that of `x`."""
    if x.device.type == "cpu":
        from interp_kernels.vendor import flash

        return lambda q, k, v: flash(x.scale)(q, k, v, True, None)
    first, why = vendor.name_of(x.q, x.k, x.v)
    name = name or first
    if not name:
        raise Skip(why)
    if not vendor.trusted(name, x.q.dtype, x.shape.dim, True, x.device.index):
        raise Skip(f"{name}'s private call does not give what is expected of it here")
    return lambda q, k, v: vendor.flash(name, x.scale)(q, k, v, True, None)


def entropy_emulation(x: Inputs) -> Run:
    """lse − scale·q·(A k): the output, and a second attention with the keys as values."""
    call = vendor_call(x)

    def run() -> State:
        out, lse = call(x.q, x.k, x.v)
        mean_key, _ = call(x.q, x.k, x.k)
        return State(out, lse, dict(entropy=lse - x.scale * torch.einsum("bhld,bhld->bhl", x.q, mean_key).float()))

    def check(state: State) -> float:
        worst = check_state(x, (), state)
        for head, i in x.samples:  # 16-bit mean keys cost accuracy: this only finds what is plainly wrong
            p = x.logits(head, i).softmax(0)
            want = -(p * p.log()).sum()
            worst = max(worst, float((state.stats["entropy"][0, head, i].double() - want).abs()) / 5e-2)
        return worst

    return Run([run], check, 2 * x.flops, x.bytes)


def transposed_flash(x: Inputs) -> Run:
    """Column sums = exp(log-sum-exp) of the transposed attention, whose key bias −lse stands in three further
    dimensions of the heads (three 16-bit numbers hold it to float32's accuracy); sequences flipped so that the
    anti-causal mask is the causal one."""
    x.lse  # noqa: B018
    group, extra = x.shape.heads // x.shape.kv_heads, 8

    def run() -> Tensor:
        left = -x.lse[..., None] / x.scale
        parts = []
        for _ in range(3):
            parts.append(left.to(x.q.dtype))
            left = left - parts[-1].float()
        keys = torch.cat([x.q, *parts, *[torch.zeros_like(parts[0])] * (extra - 3)], -1).flip(2)
        queries = pad(x.k.repeat_interleave(group, 1), (0, 3), value=1.0)
        queries = pad(queries, (0, extra - 3)).flip(2)
        return call(queries, keys, keys)[1].flip(2).exp()

    # dimension 136: FlashAttention takes it; cuDNN is asked nothing it may not know
    call = vendor_call(x, FLASH)
    return Run([run], partial(check_loosely, partial(check_received, x, total=True)), x.flops / 2, x.bytes / 2)


def check_loosely(check: Callable[[Tensor], float], got: Tensor) -> float:
    """An emulation's own inaccuracy is no failure: up to ten times what is allowed to ours."""
    return check(got) / 10


def eager_run(names: Sequence[str], x: Inputs) -> Run:
    """The whole matrix, as HuggingFace's eager attention makes it, and statistics from it."""
    group = x.shape.heads // x.shape.kv_heads

    def run() -> Tensor:
        k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
        seen = torch.ones(x.length, x.length, dtype=torch.bool, device=x.device).tril()
        s = (x.q @ k.transpose(2, 3) * x.scale).masked_fill_(~seen, -torch.inf)
        a = s.softmax(-1, dtype=torch.float32)
        if names:
            torch.special.entr(a).sum(-1), a.max(-1), a.sum(2)
        return a.to(x.q.dtype) @ v

    return Run([run], partial(check_out, x), x.flops, x.bytes)


# --- FlexAttention --------------------------------------------------------------------------------------------


def flex(x: Inputs) -> Callable[..., Any]:
    """`flex_attention`, compiled anew: shapes and functions are constants of the program."""
    from torch.nn.attention.flex_attention import flex_attention

    if x.device.type == "cpu":
        return flex_attention
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def aux(**what: bool) -> Any:
    """What FlexAttention shall return beside the output."""
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(**what)


def block_mask(full: Tensor, part: Tensor, keep: Callable[..., Tensor], x: Inputs) -> Any:
    """A block mask from dense (1, heads or 1, blocks, blocks) bools: `create_block_mask` would build the square."""
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        number = blocks.sum(-1, dtype=torch.int32)
        return number, blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    (count, index), (full_count, full_index) = ordered(part), ordered(full)
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK_SIZE=128, mask_mod=keep, seq_lengths=(x.length, x.length)
    )


def triangle(x: Inputs) -> tuple[Tensor, Tensor]:
    """(blocks under the diagonal, blocks on it), (1, 1, blocks, blocks) bool."""
    n = -(-x.length // 128)
    square = torch.ones(1, 1, n, n, dtype=torch.bool, device=x.device)
    return square.tril(-1), square.tril().triu()


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def flex_run(kind: str, x: Inputs) -> Run:
    """Plain; with a bias per scattered key; with its own log-sum-exp and largest score."""
    call, mask = flex(x), block_mask(*triangle(x), causal, x)
    more: Row = {}
    check: Callable[[Any], float] = partial(check_out, x)
    if kind == "bias":
        bias = torch.log(torch.where(x.scattered(64)[0] == 1, BETA, 1.0))
        more["score_mod"] = lambda score, b, h, i, j: score + bias[h, j]
        check = partial(check_out, x, bias=bias)
    elif kind == "aux":
        if x.device.type == "cpu":
            raise Skip("max_scores are not for CPUs")
        more["return_aux"] = aux(lse=True, max_scores=True)
        check = lambda got: check_out(x, got[0])  # noqa: E731

    def run() -> Any:
        return call(x.q, x.k, x.v, block_mask=mask, scale=x.scale, enable_gqa=True, **more)

    return Run([run], check, x.flops, x.bytes)


def flex_redistribution(x: Inputs) -> Run:
    """ACT's rule on 64 known keys a head: attention to them, attention to the others, and the formula."""
    labels = x.scattered(64)
    chosen = labels[0] == 1
    under, diagonal = triangle(x)
    held = pad(chosen, (0, -x.length % 128)).unflatten(-1, (-1, 128)).any(-1)[None, :, None]  # (1, heads, 1, blocks)
    none = torch.zeros_like(under & held)
    sinks = block_mask(none, (under | diagonal) & held, lambda b, h, i, j: (i >= j) & chosen[h, j], x)
    rest_part = diagonal | (under & held)
    rest = block_mask(under & ~held, rest_part, lambda b, h, i, j: (i >= j) & ~chosen[h, j], x)
    first, second, ask = flex(x), flex(x), aux(lse=True)

    def run() -> Tensor:
        out_s, aux_s = first(x.q, x.k, x.v, block_mask=sinks, scale=x.scale, enable_gqa=True, return_aux=ask)
        out_r, aux_r = second(x.q, x.k, x.v, block_mask=rest, scale=x.scale, enable_gqa=True, return_aux=ask)
        lse_s, lse_r = aux_s.lse, aux_r.lse
        share = torch.sigmoid(lse_s - lse_r).nan_to_num(0.0)
        share = torch.where(lse_r > -torch.inf, BETA * share, 1.0)[..., None].to(out_s.dtype)
        share = torch.where((lse_s > -torch.inf)[..., None], share, 0.0)
        return share * out_s.nan_to_num(0.0) + (1 - share) * out_r.nan_to_num(0.0)

    return Run([run], partial(check_rule, x, labels, act_rule(x.device)), x.flops, x.bytes)


def flex_columns(x: Inputs) -> Run:
    """Column sums by FlexAttention: keys ask, queries answer, with the bias −lse; a thin value, only the
    log-sum-exp counts."""
    x.lse  # noqa: B018
    call, (under, diagonal) = flex(x), triangle(x)
    mask = block_mask(under.transpose(2, 3), diagonal, lambda b, h, i, j: i <= j, x)
    lse, group = x.lse[0].clone(), x.shape.heads // x.shape.kv_heads
    minus, ask = lambda score, b, h, i, j: score - lse[h, j], aux(lse=True)

    def run() -> Tensor:
        queries = x.k.repeat_interleave(group, 1)
        thin = x.q[..., :16].contiguous()
        return call(queries, x.q, thin, score_mod=minus, block_mask=mask, scale=x.scale, return_aux=ask)[1].lse.exp()

    return Run([run], partial(check_loosely, partial(check_received, x, total=True)), x.flops / 2, x.bytes / 2)


# --- the table ------------------------------------------------------------------------------------------------

EVERY = LENGTHS
SHORT = (EAGER_LENGTH,)


def beside(length: int) -> tuple[tuple[int, int, int], ...]:
    """The initial token and a span of up to 1,024 keys, a quarter of the way in."""
    return (0, 1, 1), (length // 4, length // 4 + min(1024, length // 8), 1)


CASES: tuple[Case, ...] = (
    Case(CUDNN, partial(sdpa_run, SDPBackend.CUDNN_ATTENTION), lengths=EVERY),
    Case(PLAIN, partial(statistics_run, ()), CUDNN, 1.45, 1.15, lengths=EVERY),
    Case("forward with all row statistics", partial(statistics_run, NAMES), CUDNN, 1.67, 1.25, lengths=EVERY),
    Case("received alone", partial(received_run, 1), PLAIN, 0.8, 0.6, lengths=EVERY),
    Case("vendor-route edit: initial token", partial(spans_run, lambda n: ((0, 1, 1),)), CUDNN, 1.10, 1.03),
    Case("vendor-route edit: initial token and a span", partial(spans_run, beside), CUDNN, 1.10, 1.03),
    *(Case(f"single-pass edit: {n} sinks known", partial(scattered_run, n), PLAIN, 1.15, 1.05) for n in (4, 64, 1024)),
    Case("ACT exact, with its sink search", partial(act_run, 1), CUDNN, 3.8, 2.6),
    Case("ACT, 1 in 8 query blocks sampled", partial(act_run, 8), CUDNN, 2.2, 1.5),
    Case(
        "decode with edit and top-k", partial(decode_run, True, TOPK, False), BANDWIDTH, 0.6, 0.85, bar_lengths=(32768,)
    ),
    Case("decode with edit and top-k, dispatched", partial(decode_run, True, TOPK, True), BANDWIDTH),
    Case("decode with top-k", partial(decode_run, False, TOPK, False), BANDWIDTH),
    Case("decode", partial(decode_run, False, 0, False), BANDWIDTH),
    Case("top-k of the last 64 queries", partial(prefill_topk_run, 64), PLAIN),
    Case("top-k of 64 chosen queries", partial(scattered_topk_run, 64), PLAIN),
    Case("forward with entropy", partial(statistics_run, ("entropy",)), CUDNN),
    Case("forward with max and arg-max", partial(statistics_run, ("max", "argmax")), CUDNN),
    Case("forward with distance and capped distance", partial(statistics_run, ("distance", "capped_distance")), CUDNN),
    Case("forward with 16 group masses", partial(statistics_run, ("group_mass",)), CUDNN),
    Case("received from 1 in 8 query blocks", partial(received_run, 8), PLAIN),
    *(Case(f"plain forward, {name}", partial(specialised_run, name), PLAIN) for name in specialised.VARIANTS),
    Case("FlashAttention", partial(sdpa_run, SDPBackend.FLASH_ATTENTION), CUDNN, lengths=EVERY),
    Case("cuDNN with its log-sum-exp", partial(vendor_state_run, CUDNN), CUDNN),
    Case("FlashAttention with its log-sum-exp", partial(vendor_state_run, FLASH), CUDNN),
    Case("emulation: output and entropy by V := K, vendor", entropy_emulation, CUDNN),
    Case("emulation: column sums by transposed FlashAttention", transposed_flash, PLAIN),
    Case("FlexAttention", partial(flex_run, "plain"), CUDNN),
    Case("FlexAttention with a bias on 64 keys a head", partial(flex_run, "bias"), CUDNN),
    Case("FlexAttention with lse and max_scores", partial(flex_run, "aux"), CUDNN),
    Case("emulation: redistribution by two FlexAttention calls", flex_redistribution, CUDNN),
    Case("emulation: column sums by transposed FlexAttention", flex_columns, PLAIN),
    Case("eager", partial(eager_run, ()), CUDNN, lengths=SHORT),
    Case("eager with entropy, max, arg-max and received", partial(eager_run, ("all",)), CUDNN, lengths=SHORT),
)


def plan(lengths: Sequence[int], smoke: bool) -> list[Row]:
    """Rows in the order of measuring."""
    rows = []
    for length in lengths:
        for case in CASES:
            if smoke or length in case.lengths or length not in LENGTHS:
                barred = smoke or length in case.bar_lengths
                bar, goal = (case.bar, case.goal) if barred else (None, None)
                rows.append(planned(case.name, length, case.of, bar, goal))
    return rows


def poison(x: Inputs) -> None:
    """NaN into memory that the allocator will hand out next, so that what a kernel leaves unwritten shows."""
    waste = [torch.full_like(x.q, torch.nan) for _ in range(2)]
    waste += [torch.full((x.shape.heads, x.length, n), torch.nan, device=x.device) for n in (1, 1, 1, 1, 1, GROUPS)]
    del waste


def clock(run: Run, device: torch.device, seconds: float = 1.0) -> tuple[list[float], str]:
    """(milliseconds of two rounds, note)."""
    if not run.graph or device.type != "cuda":
        return record.timed(run.calls[0], device, seconds), run.note
    try:
        return record.timed_graph(run.calls, device, repeats=8 if len(run.calls) > 1 else 1), run.note
    except RuntimeError as reason:
        torch.cuda.synchronize(device)
        note = f"{run.note}; not capturable ({str(reason).splitlines()[0][:80]}), so with the gaps between launches"
        return record.timed(run.calls[0], device, seconds, flush=True), note.lstrip("; ")


@torch.no_grad()
def measure(case: Case, x: Inputs, found: Row, floors: tuple[float, float]) -> None:
    """Check, time, and put down what was found."""
    run = case.make(x)
    poison(x)
    start = time.perf_counter()
    result = run.calls[0]()
    times = [1e3 * (time.perf_counter() - start)]  # all there is in a smoke test
    if run.check is not None:
        worst = run.check(result)
        if not worst <= 1:
            raise AssertionError(f"wrong: {worst:.3g} times the allowed error against float64")
        found["error_share"] = round(worst, 4)
    del result
    if x.device.type == "cuda":
        times, run.note = clock(run, x.device)
    found |= record.figures(times)
    found["floor_ms"] = round(1e3 * max(run.flops / floors[0], run.bytes / floors[1]), 4)
    if run.note:
        found["note"] = run.note


def measure_all(
    book: Record,
    lengths: Sequence[int],
    only: str,
    shape: Shape,
    device: torch.device,
    floors: tuple[float, float],
    end: float,
) -> int:
    """Measure what is missing until the clock says `end`; how many rows are left."""
    left = 0
    for length in lengths:
        todo = [c for c in CASES if (c.name, length) in book.rows and only in c.name and book.todo(c.name, length)]
        x = None
        for case in todo:
            if time.time() > end:
                left += 1
                continue
            if x is None:
                x = Inputs(length, shape, device)
            with record.recorded(book, case.name, length) as found:
                measure(case, x, found, floors)
        del x
    return left


# --- tuning ---------------------------------------------------------------------------------------------------


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's function replaced inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@dataclass(frozen=True)
class Tuning:
    """A kernel, its candidate configurations, and how one is put in place."""

    name: str
    run: Callable[[Inputs], Run]
    module: Any
    function: str
    candidates: Sequence[Any] = field(default_factory=tuple)


def tunings(smoke: bool) -> list[Tuning]:
    columns = received_module.Config
    tiles = [(128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4)]
    wide = [configs.Config(*tile, stages) for tile in tiles for stages in (2, 3, 4)]
    keyed = [columns(*shape) for shape in [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3)]]
    keyed += [columns(*shape) for shape in [(128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 8, 3)]]
    keyed += [columns(*shape) for shape in [(64, 128, 4, 3), (128, 32, 4, 3), (128, 32, 4, 4), (256, 64, 8, 2)]]
    split = [(16, block, w, s) for block in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
    if smoke:
        wide, keyed, split = [configs.Config(32, 32, 1, 1)], [columns(32, 32, 1, 1, 1)], [(16, 32, 4, 2)]
    return [
        Tuning("forward plain", partial(statistics_run, ()), configs, "forward", wide),
        Tuning("forward all statistics", partial(statistics_run, NAMES), configs, "forward", wide),
        Tuning("received", partial(received_run, 1), received_module, "config", keyed),
        Tuning("decode", partial(decode_run, True, TOPK, False), decode_module, "config", split),
    ]


@torch.no_grad()
def tune(book: Record, length: int, only: str, shape: Shape, device: torch.device, smoke: bool, end: float) -> int:
    """Time every candidate of every kernel; "tuning" of the result says which was best. How many are left."""
    left = 0
    made = book.extra.setdefault("tuning", {})
    x = Inputs(length, shape, device)
    for tuning in tunings(smoke):
        if only not in tuning.name:
            continue
        entry = made.setdefault(f"{tuning.name}, {length}", {"best": None, "sources": book.sources, "tried": []})
        if entry["sources"] != book.sources:
            entry |= {"best": None, "sources": book.sources, "tried": []}
        for candidate in tuning.candidates:
            named = candidate if isinstance(candidate, tuple) else tuple(asdict(candidate).values())
            if any(tuple(t["config"]) == named for t in entry["tried"]):
                continue
            if time.time() > end:
                left += 1
                continue
            tried: Row = {"config": list(named)}
            entry["tried"].append(tried)
            tried["error"] = "did not end before the run was stopped"
            book.write()
            with replaced(tuning.module, tuning.function, lambda *_, candidate=candidate: candidate):
                try:
                    run = tuning.run(x)
                    worst = run.check(run.calls[0]()) if run.check is not None else 0.0
                    if not worst <= 1:
                        raise AssertionError(f"wrong: {worst:.3g} times the allowed error")
                    times, _ = clock(run, device, seconds=0.3)
                    tried.pop("error")
                    tried |= record.figures(times)
                except Exception as reason:  # too large for the device, or wrong
                    tried["error"] = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
            timed = [t for t in entry["tried"] if "ms" in t]
            entry["best"] = min(timed, key=lambda t: t["ms"])["config"] if timed else None
            book.write()
            record.tidy()
            print(tuning.name, named, tried.get("ms", tried.get("error")), flush=True)
    return left


# --- the command ----------------------------------------------------------------------------------------------


def header(gpu: str, shape: Shape | None, floors: tuple[float, float], measured: bool) -> Row:
    """All of a result but the rows."""
    return dict(
        what=WHAT,
        gpu=gpu,
        date=time.strftime("%Y-%m-%d") if measured else record.NOT_MEASURED,
        revision=record.revision() if measured else None,
        versions=record.versions() if measured else {},
        shape={k: v if isinstance(v, int) else str(v) for k, v in asdict(shape or Shape()).items()},
        ceilings=dict(tflops=floors[0] / 1e12, tb_s=floors[1] / 1e12),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--out", help="the result file (default: in $OUT, else in results/ beside this)")
    parser.add_argument("--again", action="store_true", help="measure also what is measured already")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no further row after so long")
    parser.add_argument("--tune", action="store_true", help="time configurations of the kernels instead, at 32k")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny; runs without a GPU")
    parser.add_argument("--plan", action="store_true", help="write the rows with no figure, and measure nothing")
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    if arguments.plan:
        head = header("NVIDIA H200", None, record.CEILINGS["h200"], False)
        text = record.dumps({**head, "rows": plan(lengths, False)})
        print(text, end="") if not arguments.out else Path(arguments.out).write_text(text, encoding="utf-8")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.smoke:
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    shape = Shape()
    if arguments.smoke:
        lengths = [80]
        shape = Shape(2, 1, 16, torch.bfloat16 if device.type == "cuda" else torch.float32)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (smoke test)"
    path, earlier = record.place("kernels_smoke" if arguments.smoke else "kernels", device, arguments.out)
    floors = record.ceilings(device)
    head, rows = header(gpu, shape, floors, True), plan(lengths, arguments.smoke)
    book = Record(path, head, rows, record.digest(__file__), earlier, arguments.again)
    end = time.time() + 60 * arguments.minutes
    if arguments.tune:
        left = tune(book, min(lengths[0], 32768), arguments.only, shape, device, arguments.smoke, end)
    else:
        left = measure_all(book, lengths, arguments.only, shape, device, floors, end)
    book.write()
    print(record.summary(book), path)
    if left:
        print(f"{left} left; the same command goes on.")


if __name__ == "__main__":
    main()
