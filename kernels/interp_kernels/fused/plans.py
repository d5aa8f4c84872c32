"""Decode steps that are validated, routed and laid out once a shape class.

A step's key holds what its checks, its route and its `Launch` hang on: types, shapes, devices and
dispatch keys of every tensor that is given, which are not, and what is asked. It leaves out what
moves from token to token, and that is looked at in every step: the number of keys, where the
queries stand, the sizes of scale, soft-cap and window, the edges of spans; and where a tensor's
numbers may be looked at at all, these. Strides are read by the launch itself. Whatever a key does
not know (subclasses of tensors, modes, gradients, numbers of odd types) takes the long way, which
also says what is wrong with it. Neither keys nor plans hold a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import NOTHING_ASKED, Call, Settings, check_request
from ..kinds import LARGEST, SCALE
from ..looking import may_look
from ..masking import Visibility
from ..request import Mask, Received, Request, Result
from ..steer import Rule, Steer
from . import capable
from .backend import DECODE_ROWS, asked_of_decode, choose, decoded, ready, why_not
from .decode import arguments
from .decode_launch import Launch

#: So many plans are kept; then the oldest goes.
MOST = 256

_TENSORS = (Tensor, torch.nn.Parameter)
_SETTINGS = frozenset(Settings.__annotations__)
_CAUSAL, _SHARED = Mask(), (list, tuple)
_keys_of = torch._C._dispatch_keys
#: Dispatch keys of tensors that are nothing but numbers on a device, as far as met.
_PLAIN: set[int] = set()


class _Odd(Exception):
    """This step has something that no key knows."""


class Plan:
    """What is known of a shape class: its launch, whether its edit has to be brought to the
    queries' device or to float32, and whether numbers of its tensors are checked in every step."""

    __slots__ = ("adapts", "launch", "looks")

    def __init__(self, launch: Launch, adapts: bool, looks: bool) -> None:
        self.launch, self.adapts, self.looks = launch, adapts, looks


_PLANS: dict[Hashable, Plan] = {}


def forget() -> None:
    """Every shape class is validated again."""
    _PLANS.clear()


class Step:
    """A call as it was given, its key, and the little of it that moves; `odd` where it has no
    key."""

    __slots__ = ("heads", "k", "key", "lk", "mask", "q", "request", "settings", "steer", "v")

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> None:
        self.q, self.k, self.v, self.settings = q, k, v, settings
        try:
            self.key: Hashable = self._key()
        except _Odd:
            self.key = None

    def _key(self) -> Hashable:
        q, k, v, settings = self.q, self.k, self.v, self.settings
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or forward_ad._current_level >= 0
            or not settings.keys() <= _SETTINGS
        ):
            raise _Odd
        mark = _with_gradients if torch.is_grad_enabled() else _mark
        tensors = (mark(q), _keyed(mark, k, 2), _keyed(mark, v, 2))
        self.lk = k.shape[2]
        if q.ndim != 4 or q.shape[2] > DECODE_ROWS or v.shape[2] != self.lk:
            raise _Odd
        _positive(settings.get("softcap"), sys.float_info.max)
        _positive(settings.get("scale"), SCALE)
        return (
            tensors,
            self._of_mask(mark, settings.get("mask")),
            settings.get("softcap") is None,
            mark(settings.get("sinks")),
            self._of_request(mark, settings.get("request")),
            self._of_steer(mark, settings.get("steer")),
        )

    def _of_mask(self, mark: Any, mask: Mask | None) -> Hashable:
        self.mask = mask = _CAUSAL if mask is None else mask
        if (
            type(mask) is not Mask
            or type(mask.causal) is not bool
            or mask.dense is not None
            or mask.starts is not None
            or type(mask.keep_first) is not int
            or mask.keep_first
        ):
            raise _Odd
        _whole(mask.q_start, -LARGEST, LARGEST)
        _whole(mask.k_start, -LARGEST, LARGEST)
        if mask.window is not None:
            _whole(mask.window, 1, LARGEST)
        keys = self._last(mark, mask.keys)
        return mask.causal, mask.window is None, keys, mark(mask.queries)

    def _of_request(self, mark: Any, request: Request | None) -> Hashable:
        self.request = request = NOTHING_ASKED if request is None else request
        if type(request) is not Request or type(request.names) is not frozenset:
            raise _Odd
        _whole(request.topk, 0, LARGEST)
        if not request:
            if request.labels is not None or request.n_groups or request.topk_rows is not None:
                raise _Odd
            _whole(request.cap, 0, LARGEST)
            return None
        _whole(request.n_groups, 0, LARGEST)
        _whole(request.cap, 0, LARGEST)
        labels, rows = self._last(mark, request.labels), mark(request.topk_rows)
        pairs = received = None
        if request.pairs:
            pairs = tuple((_name(name), mark(x)) for name, x in _items(request.pairs))
        if request.received:
            received = tuple(
                (_name(name), *_of_received(mark, one)) for name, one in _items(request.received)
            )
        return request.names, request.topk, labels, request.n_groups, rows, pairs, received

    def _of_steer(self, mark: Any, steer: Any) -> Hashable:
        if type(steer) in _SHARED:
            if len(steer) > 1:
                raise _Odd
            steer = steer[0] if steer else None
        if steer is not None and type(steer) is not Steer:
            raise _Odd
        if steer is not None and not steer and steer.labels is None and steer.spans == ():
            steer = None  # it changes nothing
        self.steer: Steer | None = steer
        if steer is None:
            return None
        if steer.sigmoid is not None or not steer:
            raise _Odd
        bias, labels = self._last(mark, steer.bias), self._last(mark, steer.labels)
        others = mark(steer.temper), mark(steer.blend), mark(steer.gain)
        rule: Any = steer.rule
        if type(rule) in _SHARED:
            if len(rule) != 1:
                raise _Odd
            rule = rule[0]
        if rule is None:
            if steer.spans:
                raise _Odd
            return bias, labels, others
        if type(rule) is not Rule or type(rule.renormalise) is not bool:
            raise _Odd
        ruled = (
            mark(rule.keep),
            mark(rule.receive),
            rule.renormalise,
            mark(rule.tests),
            mark(rule.bounds),
            mark(rule.rows),
        )
        if rule.keep is None or not rule.keep.ndim or type(steer.spans) not in _SHARED:
            raise _Odd
        groups = rule.keep.shape[-1]
        for span in steer.spans:
            if type(span) not in _SHARED or len(span) != 3:
                raise _Odd
            start, stop, group = span
            _whole(stop, 0, self.lk)
            _whole(start, 0, stop)
            _whole(group, 0, groups - 1)
        return bias, labels, others, ruled, len(steer.spans)

    def _last(self, mark: Any, value: Tensor | None) -> Hashable:
        """The mark of a tensor whose last dimension is the keys', whatever their number."""
        if value is None:
            return None
        marked = _keyed(mark, value, -1)
        if value.shape[-1] != self.lk:
            raise _Odd
        return marked

    def answer(self) -> Result | None:
        """The result by the class' plan; None where there is none, or it no longer runs."""
        plan = None if self.key is None else _PLANS.get(self.key)
        if plan is None:
            return None
        call = self._call(plan)
        launch = plan.launch
        try:
            found = launch.run(arguments(call, topk=launch.topk, scores=launch.scores))
        except Exception as error:
            if not capable.does_not_run(error):
                raise
            forget()  # the long way finds out, and says so
            return None
        return decoded(call, found)

    def _call(self, plan: Plan) -> Call:
        q, k, v, request, steer = self.q, self.k, self.v, self.request, self.steer
        settings: Any = self.settings
        batch, heads, lq, d = q.shape
        vis = Visibility(self.mask, batch, heads, lq, self.lk, q.device)
        if plan.looks:
            check_request(request, vis)
            if steer is not None:
                steer.check(batch, heads, lq, self.lk)
        if steer is not None and plan.adapts:
            steer = steer.wide().to(q.device)
        scale = settings.get("scale")
        return Call(
            q,
            k,
            v,
            vis,
            d**-0.5 if scale is None else scale,
            settings.get("softcap"),
            settings.get("sinks"),
            request,
            () if steer is None else (steer,),
        )

    def learn(self, call: Call) -> None:
        """Keep a plan of a call of this step that went the long way through the kernels, if it is
        one that a plan serves."""
        if self.key is None or not call.request.out:  # which is a rare step
            return
        if why_not(call) or choose(call).kind != "decode":
            return
        brought = ready(call)
        given = self.steer is not None
        adapts = given and any(
            t.device != call.q.device or (t.is_floating_point() and t.dtype.itemsize < 4)
            for t in _of_edit(self.steer)
        )
        looks = may_look(call.q.device) and bool(
            self.request.pairs
            or self.request.received
            or self.request.topk_rows is not None
            or (self.steer is not None and self.steer.labels is not None)
        )
        topk, scores = asked_of_decode(brought)
        launch = Launch(arguments(brought, topk=topk, scores=scores))
        while len(_PLANS) >= MOST:
            _PLANS.pop(next(iter(_PLANS)), None)
        _PLANS[self.key] = Plan(launch, adapts, looks)


def _mark(value: Any) -> Any:
    """(type, shape, device) of a tensor, None for None."""
    if value is None:
        return None
    if type(value) not in _TENSORS:
        raise _Odd
    if _keys_of(value).raw_repr() not in _PLAIN and not _plain(value):
        raise _Odd
    return value.dtype, value.shape, value.device


def _with_gradients(value: Any) -> Any:
    """The same where gradients are on, and none is asked for."""
    marked = _mark(value)
    if marked is not None and value.requires_grad:
        raise _Odd
    return marked


def _plain(value: Tensor) -> bool:
    """Whether the tensor's dispatch keys are those of a new one on its device; batched, conjugated,
    negated, sparse and wrapped tensors have more."""
    for mode in (True, False):
        with torch.inference_mode(mode):
            _PLAIN.add(_keys_of(torch.empty(0, device=value.device)).raw_repr())
    return _keys_of(value).raw_repr() in _PLAIN


def _keyed(mark: Any, value: Any, axis: int) -> Hashable:
    """The mark of a tensor without its keys' dimension: of four the third, or the last."""
    if value is None:
        raise _Odd
    dtype, shape, device = mark(value)
    if len(shape) != 4 if axis == 2 else not shape:
        raise _Odd
    return dtype, shape[:2] + shape[3:] if axis == 2 else shape[:-1], device


def _whole(value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _Odd


def _positive(value: Any, most: float) -> None:
    if value is not None and (type(value) is not float or not 0 < value <= most):
        raise _Odd


def _name(value: Any) -> str:
    if type(value) is not str:
        raise _Odd
    return value


def _items(value: Any) -> Any:
    if type(value) is not dict:
        raise _Odd
    return value.items()


def _of_received(mark: Any, one: Any) -> tuple[Hashable, ...]:
    if type(one) is not Received:
        raise _Odd
    band = one.band
    if band is not None:
        if type(band) is not tuple or len(band) != 2:
            raise _Odd
        for end in band:
            _whole(end, -LARGEST, LARGEST)
    return mark(one.queries), band, _name(one.reduce), mark(one.keys)


def _of_edit(steer: Steer | None) -> list[Tensor]:
    """Every tensor of an edit."""
    if steer is None:
        return []
    given = [steer.temper, steer.bias, steer.labels, steer.blend, steer.gain]
    for rule in steer.rules:
        given += [rule.keep, rule.receive, rule.tests, rule.bounds, rule.rows]
    return [t for t in given if t is not None]
