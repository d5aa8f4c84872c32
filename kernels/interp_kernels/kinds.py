"""What kind of thing each argument of a call is, checked before anything is computed with it.

Shapes are checked where they are used; this is about a list in a tensor's place, floats as indices,
a number that is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .request import Mask, Received, Request
from .steer import Rule, Steer

#: slots and counts beyond this are slips, and overflow an index
LARGEST = 2**40
#: largest size of a scale
SCALE = 1e6
#: keys of `topk`
TOPK = 65_536
#: of numpy too, and what torch.compile puts in a number's place
WHOLE = (Integral, torch.SymInt)


def check_settings(settings: Mapping[str, Any], device: torch.device) -> None:
    """Raise `TypeError` or `ValueError` naming the setting of a call that is of another kind."""
    for name, kind in (("mask", Mask), ("request", Request), ("sinks", Tensor)):
        value = settings.get(name)
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} is a {kind.__name__} or None, not {type(value).__name__}.")
    for name in ("scale", "softcap"):
        _number(settings.get(name), name, positive=name == "softcap")
    scale = settings.get("scale")
    if scale is not None and abs(scale) > SCALE:  # logits below −1e29 are taken for hidden keys
        raise ValueError(f"scale is {scale:g}; it must be between −{SCALE:g} and {SCALE:g}.")
    _tensor(settings.get("sinks"), "sinks", device, "float")
    if settings.get("mask") is not None:
        _check_mask(settings["mask"], device)
    if settings.get("request") is not None:
        _check_request(settings["request"], device)
    steer = settings.get("steer")
    if steer is not None:
        several = steer if isinstance(steer, list | tuple) else (steer,)
        for one in several:
            if not isinstance(one, Steer):
                raise TypeError(f"steer is a Steer, or several, not {type(one).__name__}.")
            _check_steer(one, device)


def _check_mask(mask: Mask, device: torch.device) -> None:
    for name in ("window", "q_start", "k_start", "keep_first"):
        value = getattr(mask, name)
        if not (name == "window" and value is None):
            _whole(value, f"mask.{name}")
    for name in ("keys", "queries"):
        _tensor(getattr(mask, name), f"mask.{name}", device, "flags")
    _tensor(mask.dense, "mask.dense", device, "flags or floats")
    _tensor(mask.starts, "mask.starts", device, "any")


def _check_request(request: Request, device: torch.device) -> None:
    for name in ("n_groups", "cap", "topk"):
        _whole(getattr(request, name), f"request.{name}", low=0)
    if request.topk > TOPK:  # that many columns are made for each row, however few keys there are
        raise ValueError(f"request.topk is {request.topk}; at most {TOPK} keys a row are given.")
    for name in ("labels", "topk_rows"):
        _tensor(getattr(request, name), f"request.{name}", device, "whole")
    for name in ("pairs", "received"):
        if not isinstance(getattr(request, name), Mapping):
            kind = type(getattr(request, name)).__name__
            raise TypeError(f"request.{name} is a dict by name, not {kind}.")
    for name, index in request.pairs.items():
        _tensor(index, f"pair {name!r}", device, "whole", needed=True)
    for name, question in request.received.items():
        what = f"received {name!r}"
        if not isinstance(question, Received):
            raise TypeError(f"{what} is a Received, not {type(question).__name__}.")
        _tensor(question.queries, f"{what}: queries", device, "flags")
        _tensor(question.keys, f"{what}: keys", device, "whole")
        if question.band is not None:
            if not isinstance(question.band, list | tuple) or len(question.band) != 2:
                raise TypeError(f"{what}: band is two distances (a, b), not {question.band!r}.")
            for end in question.band:
                _whole(end, f"{what}: an end of band")


def _check_steer(steer: Steer, device: torch.device) -> None:
    for name in ("temper", "bias", "blend", "gain"):
        _tensor(getattr(steer, name), f"steer.{name}", device, "float")
    _tensor(steer.labels, "steer.labels", device, "whole")
    _number(steer.sigmoid, "steer.sigmoid")
    if not isinstance(steer.spans, Sequence) or any(
        not isinstance(span, list | tuple) or len(span) != 3 for span in steer.spans
    ):
        raise TypeError(f"steer.spans are triples (start, stop, group), not {steer.spans!r}.")
    for span in steer.spans:
        for end in span:
            _whole(end, "a number of steer.spans")
    rule = steer.rule
    for one in rule if isinstance(rule, list | tuple) else () if rule is None else (rule,):
        if not isinstance(one, Rule):
            raise TypeError(f"steer.rule is a Rule, or several, not {type(one).__name__}.")
        _tensor(one.keep, "steer.rule.keep", device, "float", needed=True)
        for name in ("receive", "tests", "bounds"):
            _tensor(getattr(one, name), f"steer.rule.{name}", device, "float")
        _tensor(one.rows, "steer.rule.rows", device, "flags")


def _tensor(value: Any, what: str, device: torch.device, of: str, needed: bool = False) -> None:
    """Raise unless it is a tensor (or None) of `of`: "float", "whole", "flags" (bool, or whole
    numbers for it), "flags or floats", or "any", that holds numbers where the queries do."""
    if value is None and not needed:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a tensor, not {type(value).__name__}.")
    if (value.device.type == "meta") != (device.type == "meta"):
        raise ValueError(f"{what} is on {value.device} and the queries on {device}.")
    floats = value.is_floating_point()
    whole = not floats and not value.is_complex() and value.dtype != torch.bool
    fits = {
        "float": floats,
        "whole": whole,
        "flags": whole or value.dtype == torch.bool,
        "flags or floats": floats or value.dtype == torch.bool,
        "any": not value.is_complex(),
    }[of]
    if not fits:
        kinds = {"float": "floating-point numbers", "whole": "whole numbers"}
        raise ValueError(f"{what} is {value.dtype}; it must hold {kinds.get(of, of)}.")


def _whole(value: Any, what: str, low: int = -LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, WHOLE):
        raise TypeError(f"{what} is a whole number, not {value!r}.")
    number: Any = value  # which type checkers take for something without an order
    if not low <= number <= LARGEST:
        raise ValueError(f"{what} is {value}; it must be between {low} and 2⁴⁰.")


def _number(value: Any, what: str, positive: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is a number or None, not {type(value).__name__}.")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{what} is {value}; it must be {'positive' if positive else 'finite'}.")
