"""Launching the warp-specialised forward, for the calls that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .configs import Config
from .primitives import INTERPRETED, LOG2E, precision
from .specialised_kernel import specialised_kernel

#: Statistics that it gives.
NAMES = ("entropy", "max", "argmax")
#: Head dimensions: a tile of both products fits the shared memory, and no register spills.
DIMS = (64, 128)


def serves(q: Tensor, k: Tensor, v: Tensor, names: str, dressed: bool) -> bool:
    """Whether it knows the call: heads of 64 or 128 dimensions of 16 bits, in layouts that the copy
    engine reads; dressed: anything but causality is asked of the mask, or of the logits."""
    d = q.shape[3]
    small = q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    return (
        not dressed
        and small
        and d in DIMS
        and v.shape[3] == d
        and set(names.split()) <= set(NAMES)
        and all(_described(x) for x in (q, k, v))
    )


def _described(x: Tensor) -> bool:
    """Whether a descriptor can say where the tensor lies: 16-byte rows, one dimension a step."""
    per = 16 // x.element_size()
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % per == 0 for s in x.stride()[:3])


@dataclass(frozen=True)
class Plain:
    """A call that it knows: causal, or all keys; `offset` is the column at which the first row
    stands."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    offset: int


def launch(config: Config, x: Plain, out: Tensor, lse: Tensor, stats: Mapping[str, Tensor]) -> None:
    """Writes the output, the log-sum-exp and the statistics of `NAMES` that are given."""
    # Triton's allocator is the context's: what others set stays theirs
    copy_context().run(_launch, config, x, out, lse, stats)


def _launch(
    config: Config, x: Plain, out: Tensor, lse: Tensor, stats: Mapping[str, Tensor]
) -> None:
    q, k, v = x.q, x.k, x.v
    batch, heads, lq, d = q.shape
    n_kv, lk = k.shape[1:3]
    triton.set_allocator(_scratch)
    specialised_kernel[(-(-lq // config.rows) * heads * batch,)](
        q,
        k,
        v,
        out,
        lse,
        *(stats.get(name) for name in NAMES),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        lq,
        lk,
        x.offset,
        x.scale * LOG2E,
        n_kv,
        GROUP=heads // n_kv,
        BM=config.rows,
        BN=config.cols,
        D=d,
        CAUSAL=x.causal,
        ENTROPY="entropy" in stats,
        MAX="max" in stats,
        ARGMAX="argmax" in stats,
        SPECIALISE=not INTERPRETED,
        INTERP=INTERPRETED,
        PRECISION=precision(q.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors, which a kernel writes itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
