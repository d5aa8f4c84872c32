"""Kernel benchmarks: FlexAttention where it can express a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_inputs import (
    BETA,
    Inputs,
    Run,
    check_received,
    check_rule,
)
from kernel_others import (
    check_loosely,
    check_out,
)
from kernel_ours import (
    act_rule,
)
from record import Row, Skip
from torch import Tensor
from torch.nn.functional import pad


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
    """A block mask from dense (1, heads or 1, blocks, blocks) bools: `create_block_mask` would
    build the square."""
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        number = blocks.sum(-1, dtype=torch.int32)
        return number, blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(
            torch.int32
        )

    (count, index), (full_count, full_index) = ordered(part), ordered(full)
    return BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=128,
        mask_mod=keep,
        seq_lengths=(x.length, x.length),
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
    """ACT's rule on 64 known keys a head: attention to them, attention to the others, and the
    formula."""
    labels = x.scattered(64)
    chosen = labels[0] == 1
    under, diagonal = triangle(x)
    held = (
        pad(chosen, (0, -x.length % 128)).unflatten(-1, (-1, 128)).any(-1)[None, :, None]
    )  # (1, heads, 1, blocks)
    none = torch.zeros_like(under & held)
    sinks = block_mask(
        none, (under | diagonal) & held, lambda b, h, i, j: (i >= j) & chosen[h, j], x
    )
    rest_part = diagonal | (under & held)
    rest = block_mask(under & ~held, rest_part, lambda b, h, i, j: (i >= j) & ~chosen[h, j], x)
    first, second, ask = flex(x), flex(x), aux(lse=True)

    def run() -> Tensor:
        out_s, aux_s = first(
            x.q, x.k, x.v, block_mask=sinks, scale=x.scale, enable_gqa=True, return_aux=ask
        )
        out_r, aux_r = second(
            x.q, x.k, x.v, block_mask=rest, scale=x.scale, enable_gqa=True, return_aux=ask
        )
        lse_s, lse_r = aux_s.lse, aux_r.lse
        share = torch.sigmoid(lse_s - lse_r).nan_to_num(0.0)
        share = torch.where(lse_r > -torch.inf, BETA * share, 1.0)[..., None].to(out_s.dtype)
        share = torch.where((lse_s > -torch.inf)[..., None], share, 0.0)
        return share * out_s.nan_to_num(0.0) + (1 - share) * out_r.nan_to_num(0.0)

    return Run([run], partial(check_rule, x, labels, act_rule(x.device)), x.flops, x.bytes)


def flex_columns(x: Inputs) -> Run:
    """Column sums by FlexAttention: keys ask, queries answer, with the bias −lse; a thin value,
    only the log-sum-exp counts."""
    x.lse  # noqa: B018
    call, (under, diagonal) = flex(x), triangle(x)
    mask = block_mask(under.transpose(2, 3), diagonal, lambda b, h, i, j: i <= j, x)
    lse, group = x.lse[0].clone(), x.shape.heads // x.shape.kv_heads
    minus, ask = lambda score, b, h, i, j: score - lse[h, j], aux(lse=True)

    def run() -> Tensor:
        queries = x.k.repeat_interleave(group, 1)
        thin = x.q[..., :16].contiguous()
        return call(
            queries, x.q, thin, score_mod=minus, block_mask=mask, scale=x.scale, return_aux=ask
        )[1].lse.exp()

    return Run(
        [run],
        partial(check_loosely, partial(check_received, x, total=True)),
        x.flops / 2,
        x.bytes / 2,
    )
