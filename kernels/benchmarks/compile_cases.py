"""What is compiled ahead of time: every kernel, with every flag at the most common head dimension,
with the combinations that want most registers at the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import specialised
import torch

from interp_kernels import Mask, Received, Request, Rule, Steer
from interp_kernels.call import prepare
from interp_kernels.fused.decode import decode
from interp_kernels.fused.decode_statistics import statistics
from interp_kernels.fused.forward import NAMES, Keys, forward
from interp_kernels.fused.merge import Piece, merge
from interp_kernels.fused.received import received

Launch = Callable[[], Any]
Tensor = torch.Tensor

#: Compiled with all flags, and with the worst.
DIMS, MORE_DIMS = (128,), (64, 96, 192, 256)

_LABELS = torch.zeros(1, 256, dtype=torch.int32)
_KEEP = Keys(torch.ones(1, 4, 256, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int32))
_LISTS = Keys(
    lists=torch.zeros(1, 4, 256, dtype=torch.int32), counts=torch.zeros(1, 4, dtype=torch.int32)
)
_BIAS, _TEMPER = torch.zeros(1, 1, 256), torch.zeros(1, 4, 256)
_ALL: dict[str, Any] = dict(names=NAMES, labels=_LABELS, n_groups=8)
_DRESSED: dict[str, Any] = dict(softcap=30.0, keys=_KEEP, bias=_BIAS, temper=_TEMPER)
_TWO = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))

#: Settings of the forward kernel: those of every dimension, then those of `DIMS` alone.
WORST: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep": dict(keys=_KEEP),
    "window": dict(mask=Mask(window=100)),
    "dressed": _DRESSED,
    "all": _ALL,
    "all window": dict(_ALL, mask=Mask(window=100)),
    "all dressed": dict(_ALL, **_DRESSED),
    "plain fp32": dict(dtype=torch.float32),
    "all fp32": dict(_ALL, dtype=torch.float32),
}
EVERY: dict[str, dict[str, Any]] = {
    "plain fp16": dict(dtype=torch.float16),
    "full": dict(mask=Mask(causal=False)),
    "softcap": dict(softcap=30.0),
    "entropy": dict(names=["entropy"]),
    "max+argmax": dict(names=["max", "argmax"]),
    "distances": dict(names=["distance", "capped_distance"]),
    "group mass": dict(names=["group_mass"], labels=_LABELS, n_groups=8),
    "listed": dict(keys=_LISTS),
    "bias": dict(bias=_BIAS),
    "temper": dict(temper=_TEMPER),
    "sigmoid": dict(sigmoid=-3.0),
}


def tensors(d: int, dtype: torch.dtype = torch.bfloat16, heads: int = 4) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros(1, 256, h, d, dtype=dtype).transpose(1, 2)
        for h in (heads, heads // 2, heads // 2)
    )


def one_forward(d: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Launch:
    keys, names = kwargs.pop("keys", Keys()), kwargs.pop("names", ())
    settings = {name: kwargs.pop(name) for name in ("mask", "softcap") if name in kwargs}
    labels = dict(labels=kwargs.pop("labels", None), n_groups=kwargs.pop("n_groups", 0))
    request, steer = Request(frozenset(names), **labels), Steer(**kwargs)

    def launch() -> Any:
        call = prepare(*tensors(d, dtype), steer=steer, scale=0.1, **settings)
        return forward(replace(call, request=request), keys, names)

    return launch


def columns(
    d: int, question: Received, dtype: torch.dtype = torch.bfloat16, **kwargs: Any
) -> Launch:
    def launch() -> Any:
        q, k, _ = tensors(d, dtype)
        return received(prepare(q, k, k, scale=0.1, **kwargs), torch.zeros(1, 4, 256), question)

    return launch


def step(
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    topk: int = 0,
    steer: Steer | None = None,
) -> Launch:
    def launch() -> Any:
        q, k, v = tensors(d, dtype, heads=8)
        mask = Mask(q_start=256 - rows)
        return decode(prepare(q[:, :, :rows], k, v, mask=mask, scale=0.1, steer=steer), topk=topk)

    return launch


def few_statistics(steer: Steer | None = None) -> Launch:
    """Entropy, maximum and argmax of a decode step."""

    def launch() -> Any:
        q, k, v = tensors(128, heads=8)
        names = frozenset({"entropy", "max", "argmax"})
        call = prepare(
            q[:, :, :1], k, v, mask=Mask(q_start=255), steer=steer, request=Request(names=names)
        )
        return statistics(call, decode(call, scores=True))

    return launch


def merged(rule: Rule, gradients: bool = False) -> Launch:
    def launch() -> Any:
        out, _, v = tensors(128)
        pieces = [Piece(g, 0, out, torch.zeros(1, 4, 256)) for g in (0, 1)]
        own = replace(rule, keep=rule.keep.clone().requires_grad_(gradients))
        steer = Steer(spans=((0, 1, 1),), rule=own, gain=torch.ones(1, 4, 1))
        state = merge(pieces, prepare(out, v, v, steer=steer))
        return state.out.sum().backward() if gradients else state

    return launch


def cases(family: int = 90) -> dict[str, Launch]:
    """name → what launches it."""
    made: dict[str, Launch] = {}
    act = Steer(spans=((0, 1, 1),), rule=_TWO)
    for d in (*DIMS, *MORE_DIMS):
        for name, settings in (WORST | EVERY if d in DIMS else WORST).items():
            made[f"forward {name} d{d}"] = one_forward(d, **settings)
        made[f"received d{d}"] = columns(d, Received())
        made[f"received fp32 d{d}"] = columns(d, Received(), torch.float32)
        made[f"decode d{d}"] = step(d)
        made[f"decode rule, top-k d{d}"] = step(d, topk=5, steer=act)
    made["forward plain d80"] = one_forward(80)
    dressed = Steer(bias=_BIAS, temper=_TEMPER)
    made["received dressed d128"] = columns(128, Received(), softcap=30.0, steer=dressed)
    made["received window d128"] = columns(128, Received(), mask=Mask(window=100))
    rows = Received(torch.ones(1, 256, dtype=torch.bool))
    made["received rows d128"] = columns(128, rows)
    made["received band d128"] = columns(128, Received(band=(1, 50)))
    keys = Received(keys=torch.zeros(1, 1, 64, dtype=torch.int64))
    made["received keys d128"] = columns(128, keys)
    for rows_ in (4, 8):
        made[f"decode {rows_} rows d128"] = step(128, rows=rows_)
        made[f"decode {rows_} rows, rule d128"] = step(128, rows=rows_, steer=act)
    made["decode fp32 d128"] = step(128, torch.float32)
    made["decode statistics d128"] = few_statistics()
    made["decode statistics, rule d128"] = few_statistics(act)
    made["merge d128"] = merged(_TWO)
    made["merge with gradients d128"] = merged(_TWO, gradients=True)
    # `configs.why_not`: the streaming route's
    made = {n: one for n, one in made.items() if not ("fp32" in n and n.endswith("d256"))}
    if family == 90:
        for name in ("descriptors, two loops", "warp-specialised"):
            made[f"experiment, {name} d128"] = _experiment(name)
    return made


def _experiment(name: str) -> Launch:
    return lambda: specialised.run(name, *tensors(128), 0.1)
