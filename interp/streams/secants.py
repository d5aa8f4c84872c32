"""A backward pass between two runs: each function has the slope of the line through both.

DeepLIFT's rescale rule (Shrikumar et al. 2017, arXiv 1704.02685), for every function that a
transformer is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from interp.errors import TapError
from interp.streams.backward import NORMS, POWERS, PRODUCTS, both, is_root, same
from interp_hooks.call import AttentionCall
from interp_kernels.reference import weights

#: entries that differ by a smaller share of themselves have the slope at the point
NEAR = 1e-4
_QUOTIENTS = {"div", "__truediv__", "true_divide"}


class Secants:
    """Derivatives for a batch whose second half is the reference of its first.

    With x, x' an entry in both runs and Δ their difference, f: Δf = (f(x) − f(x'))/(x − x') · Δx; a
    product: Δ(ab) = ā Δb + b̄ Δa, bars the means of both runs; norms, softmax and attention's logits
    are made of these. So Σ ∂m/∂x · Δx over what enters is m(x) − m(x') to rounding, where every
    function is one of those.
    """

    def activated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        return secant(x, out)

    def called(
        self, name: str, args: tuple, kwargs: dict[str, Any], out: torch.Tensor
    ) -> torch.Tensor | None:
        if is_root(name, args):
            return secant(args[0], out)
        if name in POWERS and len(args) > 1 and args[1] == 2:
            return square(args[0])
        if name in NORMS:
            return _norm(name, *args, **kwargs)
        if name in PRODUCTS and both(args):
            return product(*args)
        if name in _QUOTIENTS and both(args):
            return product(args[0], secant(args[1], 1 / args[1]))
        return None

    def patterned(self, pattern: torch.Tensor) -> torch.Tensor | None:
        raise TapError(
            "Differences from a reference run need the queries and keys, and TransformerLens shows "
            "the weights; load the HuggingFace model."
        )

    def attended(self, call: AttentionCall) -> torch.Tensor | None:
        """z = p v, logits by products. Of the softmax p = exp(l − ln Σ e^l), with L(x, y) = (e^x −
        e^y)/(x − y): Δp_k = L(ln p_k, ln p'_k) (Δl_k − Σ_j w_j Δl_j), w_j = L(l_j, l'_j) / L(ln Σ
        e^l, ln Σ e^l')."""
        q, k = call.query, call.key
        assert q is not None and k is not None
        group = q.shape[1] // k.shape[1]
        wide, v = (t.repeat_interleave(group, 1) for t in (k, call.value))
        logits = call.scaling * product(q, wide.mT, torch.matmul)  # (batch, heads, queries, keys)
        if call.softcap is not None:
            logits = secant(logits, call.softcap * torch.tanh(logits / call.softcap))
        with torch.no_grad():
            pattern = weights(q, k, **call.settings)
            seen = (pattern > 0) | twin(pattern > 0)  # a weight may round to 0 in one of the runs
            biased = (logits + _bias(call, logits)).masked_fill(~seen, -torch.inf)
            lse = _with_sink(call, biased).logsumexp(-1, keepdim=True)
            share = (_log_mean(biased, twin(biased)) - _log_mean(lse, twin(lse))).exp()  # w
            p = biased - lse
            slope = _log_mean(p, twin(p)).exp()
            share, slope = (t.where(seen, torch.zeros_like(t)) for t in (share, slope))
        logits = logits.where(seen, torch.zeros_like(logits))
        p = same(pattern, slope * (logits - (share * logits).sum(-1, keepdim=True)))
        return product(p, v.to(p), torch.matmul).transpose(1, 2)

    def shared(self, value: torch.Tensor) -> torch.Tensor | None:
        return None


def twin(x: torch.Tensor) -> torch.Tensor:
    """`x` with its halves changed: each row's entry in the other run, as a constant."""
    first, second = x.detach().chunk(2)
    return torch.cat([second, first])


def secant(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` = f(x), entry by entry, with the slope through both runs; f's own where they meet."""
    with torch.no_grad():
        other = twin(x)
        near = (x - other).abs() <= NEAR * torch.maximum(x.abs(), other.abs())
        slope = (out - twin(out)) / torch.where(near, torch.ones_like(x), x - other)
    return same(out, torch.where(near, out, slope * x))


def square(x: torch.Tensor) -> torch.Tensor:
    """x², whose slope through both runs is x + x'."""
    return same(x * x, x * (x.detach() + twin(x)))


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mul,
) -> torch.Tensor:
    """times(a, b), where each factor's slope is the mean of the other over both runs."""
    mean_a, mean_b = ((t.detach() + twin(t)) / 2 for t in (a, b))
    return same(times(a, b), times(a, mean_b) + times(mean_a, b))


def _norm(
    name: str,
    x: torch.Tensor,
    shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`layer_norm` or `rms_norm`: x times one over the root of its mean square."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True) if name == "layer_norm" else x
    if eps is None:  # each function's own default
        eps = 1e-5 if name == "layer_norm" else torch.finfo(x.dtype).eps
    power = square(centred).mean(dims, keepdim=True) + eps
    out = product(centred, secant(power, power.rsqrt()))
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _bias(call: AttentionCall, logits: torch.Tensor) -> torch.Tensor:
    """What is added to the logits besides the mask, broadcast to them; 0 where nothing is."""
    dense = call.mask.dense
    if dense is None or dense.dtype == torch.bool:
        return logits.new_zeros(())
    return dense.to(logits)


def _with_sink(call: AttentionCall, logits: torch.Tensor) -> torch.Tensor:
    """The logits and, in one more column, that of a learned sink."""
    if call.sinks is None:
        return logits
    column = call.sinks.to(logits)[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1)


def _log_mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """ln of (e^x − e^y)/(x − y), which is e^x where both are equal."""
    d = (x - y).abs()
    near = d < NEAR
    safe = torch.where(near, torch.ones_like(d), d)
    return torch.maximum(x, y) + torch.where(near, -d / 2, (-torch.expm1(-safe) / safe).log())
