"""One attention call, validated once and passed whole: what every backend takes.

`prepare` checks the tensors and settings against each other, makes the mask's `Visibility` and
brings several edits together (`compose.fuse`); nothing behind it does so again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from . import compose
from .compose import Steers
from .kinds import check_settings
from .looking import lazy, may_look
from .masking import Visibility, compute_dtype
from .request import Mask, Request
from .steer import Steer, segments

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: What an absent mask, request or edit is.
CAUSAL, NOTHING_ASKED, NO_EDIT = Mask(), Request(), Steer()


class Settings(TypedDict, total=False):
    """What a call may be told beside queries, keys and values, see `attention`."""

    mask: Mask | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    request: Request | None
    steer: Steers


_SETTINGS = frozenset(Settings.__annotations__)


@dataclass(frozen=True)
class Call:
    """q (batch, heads, queries, d), k (batch, kv_heads, keys, d), v (batch, kv_heads, keys, d_v);
    who sees whom; logits = softcap·tanh(scale·q·k / softcap); sinks (heads,) logits without a
    value; what is asked; and the edits in their order, those that change nothing left out. A part
    of a call, or one otherwise edited, is `dataclasses.replace`d."""

    q: Tensor
    k: Tensor
    v: Tensor
    vis: Visibility
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    request: Request = NOTHING_ASKED
    steers: tuple[Steer, ...] = ()

    @property
    def mask(self) -> Mask:
        """Which keys each query sees, as it was given."""
        return self.vis.mask

    @property
    def steer(self) -> Steer:
        """The only edit, or the first of several; one that changes nothing where there is none."""
        return self.steers[0] if self.steers else NO_EDIT

    @property
    def group(self) -> int:
        """Query heads a key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    @lazy
    def dtype(self) -> torch.dtype:
        """What PyTorch computes in: float64 if anything is, else float32."""
        return compute_dtype(self.q, self.k, self.v)

    @lazy
    def segments(self) -> list[tuple[int, int, int]]:
        """(start, stop, group) of all key columns, as the only edit's spans cut them."""
        return segments(self.steer.spans, self.vis.lk)

    def needs_grad(self, *tensors: Tensor | None) -> bool:
        """Gradients are on, and one of the tensors (if none is given: q, k, v or sinks) wants
        one."""
        if not torch.is_grad_enabled():
            return False
        asked = tensors or (self.q, self.k, self.v, self.sinks)
        return any(t is not None and t.requires_grad for t in asked)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *, fuse: bool = True, **settings: Unpack[Settings]
) -> Call:
    """The call, validated; fuse: several edits as few as they can be, for backends that take them
    so. Raises `ValueError` naming the argument that does not fit."""
    for name in settings:
        if name not in _SETTINGS:
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
    (batch, heads, lq, d), lk = _check_tensors(q, k, v)
    scale, sinks = settings.get("scale"), settings.get("sinks")
    request, steer = settings.get("request"), settings.get("steer")
    if any(value is not None for value in settings.values()):
        check_settings(settings, q.device)
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, expected ({heads},): a logit a query head."
        )
    vis = Visibility(settings.get("mask") or CAUSAL, batch, heads, lq, lk, q.device)
    if request is None:
        request = NOTHING_ASKED
    elif request is not NOTHING_ASKED:
        check_request(request, vis)
    steers: tuple[Steer, ...] = ()
    if steer is not None:
        compose.check(steer, batch, heads, lq, lk)
        steers = compose.fuse(steer, lk, q.device) if fuse else compose.as_steers(steer)
    scale = d**-0.5 if scale is None else scale
    return Call(q, k, v, vis, scale, settings.get("softcap"), sinks, request, steers)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, int]:
    """The shape of the queries and how many keys there are; raises `ValueError` naming the one of
    queries, keys and values that does not fit."""
    shape, keys, values = q.shape, k.shape, v.shape
    if not (
        len(shape) == len(keys) == len(values) == 4
        and q.dtype.is_floating_point
        and (k.dtype is q.dtype or k.dtype.is_floating_point)
        and (v.dtype is q.dtype or v.dtype.is_floating_point)
        and q.device == k.device == v.device
    ):
        _refuse_tensors(q, k, v)
    batch, heads, _, d = shape
    kv_batch, kv_heads, lk, kv_d = keys
    if values[:3] != keys[:3] or batch != kv_batch or d != kv_d:
        raise ValueError(
            f"Shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if not d or not heads or not batch:
        missing = "dimensions" if not d else "heads" if not heads else "samples"
        raise ValueError(f"q {tuple(q.shape)} has no {missing} to attend by.")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly.")
    return shape, lk


def _refuse_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` naming the first tensor of a wrong rank, type or device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be (batch, heads, tokens, dim)."
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; attention takes floating-point tensors.")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; move one of them.")


def check_request(request: Request, vis: Visibility) -> None:
    """Raise `ValueError` naming the part of the request that does not fit."""
    batch, lq, lk = vis.batch, vis.lq, vis.lk
    if request.labels is not None:
        if tuple(request.labels.shape) != (batch, lk):
            raise ValueError(
                f"request.labels has shape {tuple(request.labels.shape)}, expected {(batch, lk)}."
            )
        if request.labels.is_floating_point():
            raise ValueError(
                f"request.labels are {request.labels.dtype}; they must be integers, a group a key."
            )
    if request.topk_rows is not None:
        shape = tuple(request.topk_rows.shape)
        if len(shape) != 1 or request.topk_rows.is_floating_point():
            raise ValueError(
                f"request.topk_rows is {request.topk_rows.dtype} {shape}; it must list query rows, "
                "(m,)."
            )
        _in_range("request.topk_rows", request.topk_rows, lq, "query rows")
    for name, index in request.pairs.items():
        shapes = [(b, n) for b in (1, batch) for n in (1, lq)]
        if index.ndim != 3 or tuple(index.shape[:2]) not in shapes:
            raise ValueError(
                f"pair {name!r} has shape {tuple(index.shape)}, expected ({batch}, {lq} or 1, m) "
                "columns."
            )
        _in_range(f"pair {name!r}", index, lk)
    for name in request.received:
        _check_received(name, request, vis)


def _check_received(name: str, request: Request, vis: Visibility) -> None:
    question, batch, heads = request.received[name], vis.batch, vis.heads
    if question.queries is not None and tuple(question.queries.shape) != (batch, vis.lq):
        shape = tuple(question.queries.shape)
        raise ValueError(
            f"received {name!r}: queries has shape {shape}, expected {(batch, vis.lq)}."
        )
    if question.keys is not None:
        shape = tuple(question.keys.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
            raise ValueError(
                f"received {name!r}: keys has shape {shape}, expected ({batch}, {heads} or 1, n)."
            )
        _in_range(f"received {name!r}: keys", question.keys, vis.lk)
    if question.reduce not in ("mean", "sum", "max"):
        raise ValueError(
            f"received {name!r}: reduce is {question.reduce!r}; it is mean, sum or max."
        )


def _in_range(what: str, index: Tensor, limit: int, of: str = "keys") -> None:
    """A number past the last is an error, and of rows one below the first; of keys, those below 0
    are none. On a GPU looking would wait for the device, so there it is not looked at."""
    if not may_look(index.device) or not index.numel() or type(index) is not Tensor:
        return
    if of != "keys" and int(index.min()) < 0:
        raise ValueError(f"{what} lists number {int(index.min())}; {of} count from 0.")
    if int(index.max()) >= limit:
        raise ValueError(
            f"{what} lists number {int(index.max())}, and there are {limit} {of}, from 0."
        )
