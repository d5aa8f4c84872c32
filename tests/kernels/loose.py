"""The kernels' own functions with a call's tensors and settings given one by one, unchecked."""

from __future__ import annotations

from typing import Any

import torch

from interp_kernels import Mask, Received, Request, Result, Rule, Steer
from interp_kernels import attention as public
from interp_kernels.call import Call
from interp_kernels.compose import as_steers
from interp_kernels.fused import decode as decode_module
from interp_kernels.fused import forward as forward_module
from interp_kernels.fused import merge as merge_module
from interp_kernels.fused import received as received_module
from interp_kernels.masking import Visibility
from interp_kernels.streaming import route

Tensor = torch.Tensor


def loose(
    q: Tensor, k: Tensor, v: Tensor, keys: int | None = None, steer: Any = None, **settings: Any
) -> Call:
    """A call as a backend gets it; keys: how many there are, where k is a pool of pages."""
    (batch, heads, lq, _), lk = q.shape, k.shape[2] if keys is None else keys
    vis = Visibility(settings.pop("mask", Mask()), batch, heads, lq, lk, q.device)
    scale = settings.pop("scale", q.shape[-1] ** -0.5)
    request = settings.pop("request", None)
    request = Request() if request is None else request
    return Call(q, k, v, vis, scale, request=request, steers=as_steers(steer), **settings)


def decode(
    q: Tensor, k: Tensor, v: Tensor, *, pages: Tensor | None = None, **settings: Any
) -> decode_module.Decoded:
    options = {
        name: settings.pop(name)
        for name in ("topk", "scores", "stands", "n_splits")
        if name in settings
    }
    keys = None if pages is None else pages.shape[1] * k.shape[2]
    return decode_module.decode(loose(q, k, v, keys, **settings), pages=pages, **options)


def received(
    q: Tensor, k: Tensor, lse: Tensor, question: Received, **settings: Any
) -> tuple[Tensor, Tensor]:
    steer = Steer(temper=settings.pop("temper", None), bias=settings.pop("bias", None))
    return received_module.received(loose(q, k, k, steer=steer, **settings), lse, question)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, names: Any = (), **settings: Any
) -> forward_module.State:
    return forward_module.forward(loose(q, k, v, **settings), names=names)


def merge(pieces: Any, rule: Rule, queries: int, v: Tensor) -> forward_module.State:
    """Of rows that have no other keys than the pieces'."""
    lse = pieces[0].lse
    q = v.new_empty(*lse.shape[:2], queries, 1)
    spans = ((0, 0, 0),)
    return merge_module.merge(pieces, loose(q, v, v, steer=Steer(spans=spans, rule=rule)))


def reference_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Result:
    return public(q, k, v, backend="reference", **settings)


def streaming_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Result:
    return public(q, k, v, backend="streaming", **settings)


def choose(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> route.Route:
    return route.choose(loose(q, k, v, **settings))
