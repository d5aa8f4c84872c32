"""Kernel benchmarks: the vendors' kernels, exact emulations with them, eager attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernel_inputs import (
    FLASH,
    OUT_ERROR,
    Inputs,
    Run,
    check_received,
    check_state,
    error,
)
from record import Skip
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from interp_kernels.fused import vendor_states
from interp_kernels.fused.forward import State


def sdpa_run(backend: SDPBackend, x: Inputs) -> Run:
    """`scaled_dot_product_attention` forced to one backend; the CPU's own in a smoke test."""
    note, k, v = "", x.k, x.v
    if x.device.type == "cpu":
        backend = SDPBackend.FLASH_ATTENTION

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                x.q, k, v, is_causal=True, scale=x.scale, enable_gqa=grouped
            )

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


def vendor_call(
    x: Inputs, name: str = ""
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A causal vendor call (q, k, v) → (out, lse) with scale 1 or that of `x`."""
    if x.device.type == "cpu":
        from interp_kernels.streaming.vendor import flash

        return lambda q, k, v: flash(x.scale)(q, k, v, True, None)
    first, why = vendor_states.name_of(x.q, x.k, x.v)
    name = name or first
    if not name:
        raise Skip(why)
    if not vendor_states.trusted(name, x.q.dtype, x.shape.dim, True, x.device.index):
        raise Skip(f"{name}'s private call does not give what is expected of it here")
    return lambda q, k, v: vendor_states.flash(name, x.scale)(q, k, v, True, None)


def entropy_emulation(x: Inputs) -> Run:
    """lse − scale·q·(A k): the output, and a second attention with the keys as values."""
    call = vendor_call(x)

    def run() -> State:
        out, lse = call(x.q, x.k, x.v)
        mean_key, _ = call(x.q, x.k, x.k)
        return State(
            out,
            lse,
            dict(entropy=lse - x.scale * torch.einsum("bhld,bhld->bhl", x.q, mean_key).float()),
        )

    def check(state: State) -> float:
        worst = check_state(x, (), state)
        for (
            head,
            i,
        ) in x.samples:  # 16-bit mean keys cost accuracy: this only finds what is plainly wrong
            p = x.logits(head, i).softmax(0)
            want = -(p * p.log()).sum()
            worst = max(
                worst, float((state.stats["entropy"][0, head, i].double() - want).abs()) / 5e-2
            )
        return worst

    return Run([run], check, 2 * x.flops, x.bytes)


def transposed_flash(x: Inputs) -> Run:
    """Column sums = exp(log-sum-exp) of the transposed attention, whose key bias −lse stands in
    three further dimensions of the heads (three 16-bit numbers hold it to float32's accuracy);
    sequences flipped so that the anti-causal mask is the causal one."""
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
    return Run(
        [run],
        partial(check_loosely, partial(check_received, x, total=True)),
        x.flops / 2,
        x.bytes / 2,
    )


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
