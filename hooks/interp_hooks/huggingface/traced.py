"""Attention recognised in the tensor operations it is made of.

softmax(s · q kᵀ + bias) v is a product, some arithmetic, a softmax over the last dimension and
another product. While a `Trace` is active, every torch function that a module calls passes through
it; it follows the first product to the softmax and the weights to their product with v, and there
it can put another z in place. What stands between q kᵀ and the softmax (a mask, ALiBi, relative
positions) is the bias: the logits minus s · q kᵀ. A step it does not know ends a trail, so that the
attention is not recognised rather than misread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from interp_hooks.errors import TapError

#: a bias of this and below hides a key whose weight is zero: architectures write −1e4 to −∞
HIDDEN = -9e3


@dataclass(frozen=True)
class Scores:
    """scale · q kᵀ, and perhaps a bias: q (…, queries, d), k (…, keys, d); `sinks` (…, queries, 1)
    are logits without a value that stand in a last column of their own."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    place: Any = None  # where the product was made
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """softmax(logits) over the last dimension, logits (…, queries, keys) = scale · q kᵀ + bias."""

    scores: Scores
    logits: torch.Tensor
    weights: torch.Tensor
    place: Any = None  # where the softmax was taken


@dataclass(frozen=True)
class Attention:
    """One attention as a module computes it.

    q (…, queries, d), k (…, keys, d), v (…, keys, d_v); `bias` (…, queries, keys) is the logits
    minus scale · q kᵀ, up to a constant a row (with `sinks`, which takes the sink to 0); `blind`
    (…, queries, 1) are rows all of whose keys are hidden, padding: their bias spreads the weight as
    the module has it; `weights` is the module's own softmax, None where it used torch's fused
    attention; `sinks`: whether a logit of 0 without a value is in it too; `places` where its
    operations were called; `shown` are the tensors of weights that the module may hand on.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None
    blind: torch.Tensor | None
    weights: torch.Tensor | None
    sinks: bool
    places: tuple[Any, ...]
    shown: tuple[torch.Tensor, ...] = ()


#: operations that leave a tensor's numbers and its last two dimensions as they are
SAME = frozenset(
    "contiguous clone to float double half bfloat16 type type_as dropout detach view reshape "
    "unsqueeze squeeze flatten unflatten".split()
)
#: operations between q kᵀ and the softmax whose effect the bias holds
BIASED = frozenset("add iadd radd sub isub masked_fill where max maximum clamp nan_to_num".split())
SCALED = frozenset("mul imul rmul multiply".split())
DIVIDED = frozenset("div idiv truediv itruediv divide true_divide".split())
#: operations on q and k that keep a factor which all their numbers have
MOVED = SAME | frozenset("transpose permute swapaxes expand t mT".split())
PRODUCTS = frozenset("matmul bmm baddbmm einsum".split())


class Trace(TorchFunctionMode):
    """Follows attention through torch's functions; `replace(attention)` gives the z (…, queries,
    d_v) to use in place of the module's own, None for its own; `place()` says where an operation
    is called."""

    def __init__(
        self,
        replace: Callable[[Attention], torch.Tensor | None],
        place: Callable[[], Any] = lambda: None,
    ):
        super().__init__()
        self._replace, self._place = replace, place
        self._known: dict[int, Scores | Weights | float] = {}
        self._alive: list[torch.Tensor] = []  # an id is only good while its tensor lives
        self.lost: str | None = None  # the operation at which scores were last lost

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in PRODUCTS:
            return self._product(name, func, args, kwargs)
        if name == "softmax":
            return self._softmax(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and name != "get":
            self._follow(name, args, kwargs, out)
        return out

    # -- what is known of a tensor -------------------------------------------------------------

    def _get(self, tensor: Any) -> Scores | Weights | float | None:
        return self._known.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def _set(self, tensor: torch.Tensor, what: Scores | Weights | float) -> None:
        self._known[id(tensor)] = what
        self._alive.append(tensor)

    def _follow(self, name: str, args: tuple, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        """What is known of an operation's output."""
        parts = args[0] if name in ("cat", "concat") and args else args
        given = [a for a in (*parts, *kwargs.values()) if isinstance(a, torch.Tensor)]
        known = next(((a, w) for a in given if (w := self._get(a)) is not None), None)
        source, what = known if known is not None else (None, None)
        self._known.pop(id(out), None)  # an operation in place
        new = _after(name, tuple(parts), kwargs, source, what, out)
        if new is not None:
            self._set(out, new)
        elif isinstance(what, Scores) and source is not None and out.shape == source.shape:
            self.lost = name

    # -- the three steps -----------------------------------------------------------------------

    def _product(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        order = _operands(name, args, kwargs, self._weighs)
        weights = None if order is None else self._get(order.left)
        if order is not None and isinstance(weights, Weights):
            return self._finish(weights, order, lambda: func(*args, **kwargs))
        out = func(*args, **kwargs)
        if order is not None:
            a, b = order.canonical()  # (…, queries, d), (…, d, keys)
            if a.ndim >= 3 and b.ndim >= 2 and order.scores_in_order:
                (q, f), (k, g) = self._unscaled(order.left, a), self._unscaled(order.right, b)
                scores = Scores(q, k.transpose(-1, -2), f * g * order.alpha, self._place())
                self._set(out, scores)
        return out

    def _weighs(self, tensor: torch.Tensor) -> bool:
        return isinstance(self._get(tensor), Weights)

    def _unscaled(self, given: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The tensor without the factor that a module gave all its numbers, and the factor."""
        factor = self._get(given)
        if not isinstance(factor, float) or factor == 0:
            return tensor, 1.0
        return tensor / factor, factor

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        logits: Any = args[0] if args else kwargs.get("input")
        out = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        scores = self._get(logits)
        if isinstance(scores, Scores) and dim in (-1, out.ndim - 1):
            self._set(out, Weights(scores, logits, out, self._place()))
        return out

    def _finish(self, w: Weights, order: _Operands, plain: Callable[[], Any]) -> Any:
        """The product of the weights and v: z, ours or its own."""
        left, v = order.canonical()  # (…, queries, keys), (…, keys, d_v)
        q, k, scale = w.scores.q, w.scores.k, w.scores.scale
        lead = w.logits.shape[:-2]
        product = scale * (q.double() @ k.double().transpose(-1, -2))
        logits, sinks = w.logits.double(), w.scores.sinks
        if sinks is not None:  # no constant of a row matters: the sink is 0 in every one
            logits = logits[..., :-1] - logits[..., -1:]
        most = logits.amax(-1, keepdim=True)
        blind = (most <= HIDDEN) & most.isfinite() & (sinks is None)
        bias = torch.where(blind, logits - most, logits) - product.reshape(logits.shape)
        q, k = (x if x.shape[:-2] == lead else _lead(x, lead) for x in (q, k))
        v = v if v.ndim == w.logits.ndim else _lead(v, lead)
        places = (w.scores.place, w.place, self._place())
        shown = (w.weights, left)
        z = self._replace(
            Attention(q, k, v, scale, bias, blind, w.weights, sinks is not None, places, shown)
        )
        if z is None:
            return plain()
        return order.arrange(z.reshape(*left.shape[:-1], z.shape[-1]))

    def _fused(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """torch's own attention, which names its parts."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        if given.get("dropout_p"):
            raise TapError(
                "The model is in training mode with attention dropout; call model.module.eval() "
                "first."
            )
        scale = given.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
        if given.get("enable_gqa"):
            shape = (*q.shape[:-2], q.shape[-2], k.shape[-2])
        bias, mask = None, given.get("attn_mask")
        if given.get("is_causal"):
            seen = torch.ones(shape[-2:], dtype=torch.bool, device=q.device).tril()
            bias = torch.zeros(shape[-2:], device=q.device).masked_fill(~seen, -math.inf)
        elif mask is not None:
            bias = mask
            if mask.dtype == torch.bool:
                bias = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, -math.inf)
        if bias is not None:
            bias = bias.expand(shape)
        places = (self._place(),) * 3
        z = self._replace(Attention(q, k, v, scale, bias, None, None, False, places))
        return func(*args, **kwargs) if z is None else z


def _after(
    name: str,
    args: tuple,
    kwargs: dict[str, Any],
    source: torch.Tensor | None,
    what: Scores | Weights | float | None,
    out: torch.Tensor,
) -> Scores | Weights | float | None:
    """What an operation's output is, `source` being the first of its inputs of which `what` is
    known."""
    factor = _factor(name, args, source) if name in SCALED or name in DIVIDED else None
    if source is None or what is None or isinstance(what, float):
        if factor is not None:
            return factor * (what if isinstance(what, float) else 1.0)
        return what if name in MOVED else None
    if name in ("cat", "concat"):
        return _with_sinks(args, source, what, out)
    if name == "getitem":
        return _without_sinks(source, what, out)
    whole = out.shape[-2:] == source.shape[-2:] and out.numel() == source.numel()
    if not whole:
        # a bias with a larger batch (or one for each head) widens the scores
        widened = isinstance(what, Scores) and name in BIASED
        if not widened or out.shape[-2:] != source.shape[-2:]:
            return None
    if name in SAME:
        return what
    if isinstance(what, Weights):
        return _emptied(what, out) if name == "masked_fill" else None
    if factor is not None and what.sinks is None:
        return replace(what, scale=what.scale * factor)
    if name in SCALED and _switches(args, source):
        return what
    subtracted = name in ("sub", "isub") and args and args[0] is not source
    if name in BIASED and not subtracted and "alpha" not in kwargs:
        return what
    return None


def _factor(name: str, args: tuple, source: torch.Tensor | None) -> float | None:
    """The number by which an operation multiplies a tensor; None if it is no number."""
    if len(args) < 2:
        return None
    a, b = args[0], args[1]
    if (source is not None and b is source) or not isinstance(a, torch.Tensor):
        a, b = b, a
        if name in DIVIDED:
            return None
    if isinstance(b, torch.Tensor):
        if b.numel() != 1 or b.requires_grad or b.device.type == "meta":
            return None
        b = float(b)
    if isinstance(b, bool) or not isinstance(b, (int, float)) or not b:
        return None
    return float(b) if name in SCALED else 1 / float(b)


def _with_sinks(
    parts: tuple, source: torch.Tensor, what: Scores | Weights, out: torch.Tensor
) -> Scores | None:
    """Scores with a last column of logits that belong to no key."""
    if len(parts) != 2 or parts[0] is not source or not isinstance(what, Scores):
        return None
    more = parts[1]
    added = more.shape[:-1] == source.shape[:-1] and more.shape[-1] == 1
    fits = added and out.shape[-1] == source.shape[-1] + 1 and what.sinks is None
    return replace(what, sinks=more) if fits else None


def _without_sinks(
    source: torch.Tensor, what: Scores | Weights, out: torch.Tensor
) -> Weights | None:
    """The weights without their last column, the sinks'."""
    if not isinstance(what, Weights) or what.scores.sinks is None:
        return None
    own = source[..., :-1]
    same = own.shape == out.shape and own.data_ptr() == out.data_ptr()
    return replace(what, weights=out) if same else None


def _switches(args: tuple, source: torch.Tensor) -> bool:
    """Whether a product is with zeros and ones, a mask."""
    others = [a for a in args if isinstance(a, torch.Tensor) and a is not source]
    return len(others) == 1 and bool(((others[0] == 0) | (others[0] == 1)).all())


def _emptied(w: Weights, out: torch.Tensor) -> Weights | None:
    """The weights after zeros were written into rows that see nothing; None if others changed."""
    rows = (out != 0).any(-1, keepdim=True)
    same = bool(((out - w.weights.reshape(out.shape)).abs() * rows <= 1e-6).all())
    return replace(w, weights=out) if same else None


def _lead(x: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """x (…, n, d) with its leading dimensions as the logits have them; a single head stays so."""
    if math.prod(x.shape[:-2]) == math.prod(lead):
        return x.reshape(*lead, *x.shape[-2:])
    while x.ndim < len(lead) + 2:
        x = x[None]
    return x


@dataclass(frozen=True)
class _Operands:
    """The factors of a product, and how they and its result are to be turned: `left` (…, rows,
    inner), `right` (…, inner, columns)."""

    left: torch.Tensor
    right: torch.Tensor
    alpha: float = 1.0
    turns: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    scores_in_order: bool = True

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.turns is None:
            return self.left, self.right
        return self.left.permute(self.turns[0]), self.right.permute(self.turns[1])

    def arrange(self, z: torch.Tensor) -> torch.Tensor:
        """The canonical product (…, rows, columns) as the operation gives it."""
        return z if self.turns is None else z.permute(self.turns[2])


def _operands(
    name: str, args: tuple, kwargs: dict[str, Any], weighs: Callable[[torch.Tensor], bool]
) -> _Operands | None:
    """The factors of a product; None for one that is no product of two matrices."""
    if name == "einsum":
        return _summed(args, weighs)
    if name == "baddbmm":
        given = {**dict(zip(("input", "batch1", "batch2"), args, strict=False)), **kwargs}
        return _Operands(given["batch1"], given["batch2"], float(kwargs.get("alpha", 1)))
    left: Any = args[0] if args else kwargs.get("input")
    right: Any = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    both = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return _Operands(left, right) if both else None


def _summed(args: tuple, weighs: Callable[[torch.Tensor], bool]) -> _Operands | None:
    """The factors of an einsum that is a batched product of two matrices, attention weights first;
    None for any other."""
    equation, tensors = args[0], args[1:]
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    if not isinstance(equation, str) or len(tensors) != 2 or "." in equation:
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    if not out or any(len(set(letters)) != len(letters) for letters in (a, b, out)):
        return None
    known = weighs(tensors[0]) or weighs(tensors[1])
    if weighs(tensors[1]) or (not known and out[-1] in a and out[-1] not in b):
        a, b, tensors = b, a, tensors[::-1]
    inner = [x for x in a if x in b and x not in out]
    rows = [x for x in a if x not in b]
    columns = [x for x in b if x not in a]
    shared = [x for x in (a if known else out) if x in a and x in b and x in out]
    if len(inner) != 1 or len(rows) != 1 or len(columns) != 1:
        return None
    if set(out) != {*shared, *rows, *columns}:
        return None
    letters = [*shared, rows[0], columns[0]]
    turns = (
        tuple(a.index(x) for x in [*shared, rows[0], inner[0]]),
        tuple(b.index(x) for x in [*shared, inner[0], columns[0]]),
        tuple(letters.index(x) for x in out),
    )
    return _Operands(tensors[0], tensors[1], 1.0, turns, list(out) == letters)
