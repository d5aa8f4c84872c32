"""Kernel benchmarks: our kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from kernel_inputs import (
    ALPHA,
    BETA,
    CAP,
    GROUPS,
    OUT_ERROR,
    STATISTIC_ERROR,
    TOPK,
    Inputs,
    Run,
    check_received,
    check_rule,
    check_state,
    error,
)
from record import Row
from torch import Tensor

from interp_kernels import Mask, Received, Request, Result, Rule, Steer, attention, explain
from interp_kernels.call import prepare
from interp_kernels.fused import configs, vendor_states
from interp_kernels.fused.backend import DECODE_ROWS, top_rows
from interp_kernels.fused.configs import Config
from interp_kernels.fused.decode import Decoded, decode
from interp_kernels.fused.forward import State, forward
from interp_kernels.fused.received import received, sampled_blocks
from interp_kernels.steer import factors


def act_rule(device: torch.device) -> Rule:
    """Group 1 keeps BETA of its mass, group 0 receives the rest in proportion."""
    return Rule(
        torch.tensor([[1.0, BETA]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    )


def statistics_run(names: Sequence[str], x: Inputs) -> Run:
    grouped: Row = dict(labels=x.group_labels, n_groups=GROUPS) if "group_mass" in names else {}
    request = Request(frozenset(names), cap=CAP, **grouped)

    def call() -> State:
        return forward(replace(x.call, request=request), names=names)

    per_row = sum(GROUPS if name == "group_mass" else 1 for name in names)
    extra = 4.0 * x.shape.heads * x.length * (per_row + 1)
    return Run([call], partial(check_state, x, names), x.flops, x.bytes + extra)


def received_run(share: int, x: Inputs) -> Run:
    """Column means over all queries, or over one of `share` blocks of queries."""
    x.lse  # noqa: B018 - computed before the clock runs
    rows = (
        None
        if share == 1
        else sampled_blocks(1, x.length, share, generator=x.generator, device=x.device)
    )

    def call() -> Tensor:
        return received(x.call, x.lse, Received(queries=rows))[0]

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
    name, _ = vendor_states.name_of(x.q, x.k, x.v)
    if not name:
        return lambda: forward(x.call).lse
    call = vendor_states.flash(name, x.scale)
    return lambda: call(x.q, x.k, x.v, True, None)[1]


def act_run(share: int, x: Inputs) -> Run:
    """ACT with the search for its sinks, from every query or from one of `share` blocks of
    queries."""
    rule, find_lse = act_rule(x.device), lse_of(x)
    found: list[Tensor] = []

    def call() -> Tensor:
        rows = (
            None
            if share == 1
            else sampled_blocks(1, x.length, share, generator=x.generator, device=x.device)
        )
        mean = received(x.call, find_lse(), Received(queries=rows))[0]
        sinks = mean > ALPHA / x.length
        sinks[..., 0] = False
        found[:] = [sinks]
        return attention(
            x.q, x.k, x.v, steer=Steer(labels=sinks.to(torch.uint8), rule=rule), backend="triton"
        ).out

    def check(out: Tensor) -> float:
        run.note = f"{float(found[0].sum(-1).double().mean()):.1f} sinks a head found"
        return check_rule(x, found[0], rule, out)

    # the log-sum-exp of the counted rows and their columns are half a forward each, the edit a
    # whole one
    run = Run([call], check, (1 + 1 / share) * x.flops, x.bytes)
    return run


def decode_run(edited: bool, topk: int, whole: bool, x: Inputs) -> Run:
    """One query over a cache of `length` keys; several caches in turn, so that none stays in the L2
    cache."""
    shape, rule = x.shape, act_rule(x.device)
    steer = Steer(spans=((0, 1, 1),), rule=rule) if edited else None
    mask = Mask(q_start=x.length - 1)
    copies = 1 if x.device.type != "cuda" else max(2, -(-512 * 2**20 // int(x.cache)))
    caches = [
        (x.random(shape.heads, 1), x.random(shape.kv_heads), x.random(shape.kv_heads))
        for _ in range(copies)
    ]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Decoded | Result:
        if whole:
            return attention(
                q, k, v, mask=mask, steer=steer, request=Request(topk=topk), backend="triton"
            )
        return decode(prepare(q, k, v, mask=mask, steer=steer), topk=topk)

    def check(got: Decoded | Result) -> float:
        q, k, v = (t.double() for t in caches[0])
        group = shape.heads // shape.kv_heads
        worst = 0.0
        for head in (0, shape.heads - 1):
            a = (x.scale * (k[0, head // group] @ q[0, head, 0])).softmax(0)
            before = a
            if steer is not None:
                mass = torch.stack([a[1:].sum(), a[0]])
                a = (
                    a
                    * factors(mass[None, None, None], rule)[0, 0, 0][
                        steer.labels_of(x.length, x.device)[0, 0]
                    ]
                )
            worst = max(worst, error(got.out[0, head, 0], a @ v[0, head // group], OUT_ERROR))
            if topk:
                own = isinstance(got, Decoded)  # the kernel's are of the weights before the rule
                prob = got.topk_prob if isinstance(got, Decoded) else got.stats["topk_prob"]
                assert prob is not None
                worst = max(
                    worst,
                    error(
                        prob[0, head, 0], (before if own else a).topk(topk).values, STATISTIC_ERROR
                    ),
                )
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
    """The strongest keys of `rows` chosen queries of the prompt, its log-sum-exp known: the
    separate pass."""
    chosen = TOPK + torch.randint(
        x.length - TOPK, (min(rows, x.length // 2),), generator=x.generator, device=x.device
    )
    request = Request(topk=TOPK, topk_rows=chosen)
    lse, last = x.lse, int(chosen[-1])

    def call() -> dict[str, Tensor]:
        return top_rows(replace(x.call, request=request), lse)

    def check(got: dict[str, Tensor]) -> float:
        want = x.logits(0, last).softmax(0).topk(TOPK).values
        return error(got["topk_prob"][0, 0, -1], want, STATISTIC_ERROR)

    passes = -(-len(chosen) // DECODE_ROWS)  # each reads the cache once
    return Run(
        [call], check, 4.0 * x.length * len(chosen) * x.shape.dim * x.shape.heads, passes * x.cache
    )


def specialised_run(config: Config, names: Sequence[str], x: Inputs) -> Run:
    """The forward by the warp-specialised kernel, whatever the table says."""
    run = statistics_run(names, x)

    def call() -> State:
        with patch.object(configs, "forward", lambda *_: config):
            return run.calls[0]()

    return replace(run, calls=[call])
