"""What is compiled ahead of time: every kernel, with every flag at the most common head dimension,
with the combinations that want most registers at the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from interp_kernels import Mask, Received, Request, Rule, Steer
from interp_kernels.call import prepare
from interp_kernels.fused import configs, specialised
from interp_kernels.fused.backend import attention
from interp_kernels.fused.decode import decode
from interp_kernels.fused.decode_statistics import statistics
from interp_kernels.fused.edited import Edited
from interp_kernels.fused.forward import NAMES, Keys, forward
from interp_kernels.fused.merge import merge
from interp_kernels.fused.pieces import Piece
from interp_kernels.fused.received import received
from interp_kernels.fused.row_pass import row_pass

Launch = Callable[[], Any]
Tensor = torch.Tensor

#: Compiled with all flags, and with the worst.
DIMS, MORE_DIMS = (128,), (64, 96, 192, 256, 512)

_LABELS = torch.zeros(1, 256, dtype=torch.int32)
_KEEP = Keys(torch.ones(1, 4, 256, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int32))
_LISTS = Keys(
    lists=torch.zeros(1, 4, 256, dtype=torch.int32), counts=torch.zeros(1, 4, dtype=torch.int32)
)
_BIAS, _TEMPER = torch.zeros(1, 1, 256), torch.zeros(1, 4, 256)
_ALL: dict[str, Any] = dict(names=NAMES, labels=_LABELS, n_groups=8)
_DRESSED: dict[str, Any] = dict(softcap=30.0, keys=_KEEP, bias=_BIAS, temper=_TEMPER)
_FLAGS, _ADDED = torch.ones(1, 1, 256, 256, dtype=torch.bool), torch.zeros(1, 1, 256, 256)
_KEPT = Mask(window=100, keep_first=4)
_LEAST = Rule(torch.ones(1, 2), torch.tensor([[0.0, 0.3]]), renormalise=True)
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
    "all dense bias": dict(_ALL, mask=Mask(dense=_ADDED)),
    "plain fp32": dict(dtype=torch.float32),
    "all fp32": dict(_ALL, dtype=torch.float32),
}
EVERY: dict[str, dict[str, Any]] = {
    "plain fp16": dict(dtype=torch.float16),
    "full": dict(mask=Mask(causal=False)),
    "softcap": dict(softcap=30.0),
    "entropy": dict(names=["entropy"]),
    "max+argmax": dict(names=["max", "argmax"]),
    "entropy+argmax": dict(names=["entropy", "argmax"]),
    "argmax+capped": dict(names=["argmax", "capped_distance"]),
    "distances": dict(names=["distance", "capped_distance"]),
    "group mass": dict(names=["group_mass"], labels=_LABELS, n_groups=8),
    "listed": dict(keys=_LISTS),
    "bias": dict(bias=_BIAS),
    "temper": dict(temper=_TEMPER),
    "sigmoid": dict(sigmoid=-3.0),
    "dense": dict(mask=Mask(dense=_FLAGS)),
    "dense bias": dict(mask=Mask(dense=_ADDED)),
    "kept keys": dict(mask=_KEPT),
    "all kept keys": dict(_ALL, mask=_KEPT),
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


def lse_alone(d: int) -> Launch:
    """Where nobody wants the output: what ACT asks first."""
    return lambda: attention(prepare(*tensors(d), request=Request(out=False)))


def columns(
    d: int,
    question: Received,
    dtype: torch.dtype = torch.bfloat16,
    edited: Edited = Edited(),
    **kwargs: Any,
) -> Launch:
    def launch() -> Any:
        q, k, _ = tensors(d, dtype)
        call = prepare(q, k, k, scale=0.1, **kwargs)
        return received(call, torch.zeros(1, 4, 256), question, edited)

    return launch


#: Of weights after a rule, and after a blend too.
_FACTORS, _ONE = torch.ones(1, 4, 256, 2), torch.zeros(1, 1, 256, dtype=torch.int64)
_RULED = Edited(_FACTORS, _ONE)
_BLENDED = Edited(_FACTORS, _ONE, torch.zeros(1, 4, 256))


def rows(
    d: int, edited: Edited, dtype: torch.dtype = torch.bfloat16, topk: int = 0, **kwargs: Any
) -> Launch:
    """The row-major pass: all statistics of edited weights, or the strongest keys."""
    request = Request(frozenset(() if topk else NAMES), _LABELS, 8)

    def launch() -> Any:
        q, k, _ = tensors(d, dtype)
        call = prepare(q, k, k, scale=0.1, **kwargs)
        lse = torch.zeros(1, 4, 256)
        return row_pass(replace(call, request=request), lse, edited, list(request.names), topk)

    return launch


def step(
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    topk: int = 0,
    steer: Steer | None = None,
    mask: Mask | None = None,
) -> Launch:
    def launch() -> Any:
        q, k, v = tensors(d, dtype, heads=8)
        at = mask or Mask(q_start=256 - rows)
        return decode(prepare(q[:, :, :rows], k, v, mask=at, scale=0.1, steer=steer), topk=topk)

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
        made[f"forward without values d{d}"] = lse_alone(d)
        made[f"received d{d}"] = columns(d, Received())
        made[f"received fp32 d{d}"] = columns(d, Received(), torch.float32)
        made[f"rows after a rule d{d}"] = rows(d, _RULED)
        made[f"rows top-k d{d}"] = rows(d, Edited(), topk=5)
        made[f"decode d{d}"] = step(d)
        made[f"decode rule, top-k d{d}"] = step(d, topk=5, steer=act)
    made["forward plain d80"] = one_forward(80)
    dressed = Steer(bias=_BIAS, temper=_TEMPER)
    made["received dressed d128"] = columns(128, Received(), softcap=30.0, steer=dressed)
    made["received window d128"] = columns(128, Received(), mask=Mask(window=100))
    chosen = Received(torch.ones(1, 256, dtype=torch.bool))
    made["received rows d128"] = columns(128, chosen)
    made["received band d128"] = columns(128, Received(band=(1, 50)))
    keys = Received(keys=torch.zeros(1, 1, 64, dtype=torch.int64))
    made["received keys d128"] = columns(128, keys)
    made["received after a rule d128"] = columns(128, Received(), edited=_RULED)
    made["received after a blend d128"] = columns(128, Received(), edited=_BLENDED)
    made["received dense d128"] = columns(128, Received(), mask=Mask(dense=_FLAGS))
    made["received kept keys d128"] = columns(128, Received(), mask=_KEPT)
    made["rows after a blend d128"] = rows(128, _BLENDED)
    made["rows dressed d128"] = rows(128, _BLENDED, softcap=30.0, steer=dressed)
    made["rows dense d128"] = rows(128, _RULED, mask=Mask(dense=_ADDED))
    made["rows kept keys d128"] = rows(128, _RULED, mask=_KEPT)
    made["rows top-k after a blend d128"] = rows(128, _BLENDED, topk=5)
    made["rows top-20 d128"] = rows(128, Edited(), topk=20)
    for d in (64, 128, 192):
        made[f"rows after a rule fp32 d{d}"] = rows(d, _RULED, torch.float32)
    made["rows top-k fp32 d128"] = rows(128, Edited(), torch.float32, topk=5)
    for rows_ in (4, 8):
        made[f"decode {rows_} rows d128"] = step(128, rows=rows_)
        made[f"decode {rows_} rows, rule d128"] = step(128, rows=rows_, steer=act)
    made["decode fp32 d128"] = step(128, torch.float32)
    made["decode dense d128"] = step(128, mask=Mask(q_start=255, dense=_FLAGS[:, :, :1]))
    made["decode kept keys d128"] = step(128, mask=replace(_KEPT, q_start=255))
    made["decode statistics d128"] = few_statistics()
    made["decode statistics, rule d128"] = few_statistics(act)
    least = Steer(spans=((0, 1, 1),), rule=_LEAST)
    made["decode least d128"] = step(128, steer=least)
    made["merge least d128"] = merged(_LEAST)
    made["merge d128"] = merged(_TWO)
    made["merge with gradients d128"] = merged(_TWO, gradients=True)
    # `configs.why_not`: the streaming route's
    narrow = configs.DIMS[: configs.DIMS.index(256)]
    made = {
        n: one for n, one in made.items() if "fp32" not in n or int(n.split(" d")[-1]) in narrow
    }
    if family == 90:
        for d in specialised.DIMS:
            made[f"forward few statistics d{d}"] = one_forward(d, names=specialised.NAMES)
            for name, names in (("plain", ()), ("statistics", specialised.NAMES)):
                for config in configs.SPECIALISED:
                    label = f"specialised {name}, {config.cols} keys d{d}"
                    made[label] = specialised_forward(d, names, config)
    return made


def specialised_forward(d: int, names: tuple[str, ...], config: configs.Config) -> Launch:
    """The forward by the kernel that the table does not name yet."""

    def launch() -> Any:
        with patch.object(configs, "forward", lambda *_: config):
            return forward(prepare(*tensors(d)), names=names)

    return launch
