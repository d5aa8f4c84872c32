"""Which outputs of a projection are the queries, keys or values of which head: tried against the
model's own numbers, not read from a class name.

Architectures store fused projections in many orders: q|k|v blocks (GPT-2, Phi-3), q, k, v head by
head (GPT-NeoX, GPT-BigCode without multi-query), in groups of a key head and its queries (Falcon,
GLM), in parts for several devices (CodeGen). All are `groups` equal stretches, each holding the
same number of heads at the same offset; so few numbers are left to try.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: largest difference, relative to the largest number, of what is the same up to rounding
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE` of a dtype; that of bfloat16 for narrower ones."""
    return TOLERANCE.get(dtype, 3e-2)


@dataclass(frozen=True)
class Split:
    """One way to cut a projection's outputs into heads.

    Attributes:
        groups: equal stretches of the outputs.
        offset: where in each stretch the heads begin.
        stride: 1, or how many numbers lie between one and the next of a head.
        repeat: how many heads in a row read the same numbers.
    """

    groups: int
    offset: int
    stride: int = 1
    repeat: int = 1

    def numbers(self, width: int, heads: int, d: int) -> torch.Tensor:
        """(heads, d) numbers of the outputs, out of `width`."""
        own = heads // self.repeat
        each = own // self.groups * d * self.stride  # of a stretch, its heads
        all_ = torch.arange(width).reshape(self.groups, -1)
        cut = all_[:, self.offset : self.offset + each : self.stride]
        return cut.reshape(own, d).repeat_interleave(self.repeat, 0)


def _divisors(n: int) -> list[int]:
    """1, n, then the others."""
    return list(dict.fromkeys([1, n, *(i for i in range(2, n) if n % i == 0)]))


def _splits(width: int, heads: int, d: int, step: int, repeats: list[int]) -> Iterator[Split]:
    """Ways to find `heads` × `d` numbers in `width` outputs, the usual ones first."""
    for repeat in repeats:
        own = heads // repeat
        for groups in _divisors(own):
            stretch, rest = divmod(width, groups)
            if rest:
                continue
            for offset in range(0, stretch - own // groups * d + 1, step):
                yield Split(groups, offset, 1, repeat)
        stride, rest = divmod(width, own * d)
        if not rest and stride > 1:
            for offset in range(stride):
                yield Split(own, offset, stride, repeat)


def agree(made: torch.Tensor, target: torch.Tensor, turned: bool, scaled: bool = False) -> bool:
    """Whether `made` is `target`, both (tokens, heads, d); if `scaled`, up to a factor a token.

    Where they may be `turned` (rotary positions, which leave the token at position 0 and every
    length as they are): whether one token is the same and all are as long.
    """
    close = tolerance(target.dtype)
    made, target = made.double(), target.double()
    if scaled:
        made, target = (
            t / t.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None] for t in (made, target)
        )
    scale = target.abs().amax().clamp_min(1e-30)
    apart = (made - target).abs().flatten(1).amax(1)  # (tokens,)
    if not turned:
        return bool(apart.amax() <= close * scale)
    if not bool((apart <= close * target.abs().flatten(1).amax(1).clamp_min(1e-30)).any()):
        return False
    lengths, wanted = made.norm(dim=-1), target.norm(dim=-1)
    return bool(((lengths - wanted).abs() <= 3 * close * wanted.amax()).all())


def find(
    outputs: torch.Tensor,
    target: torch.Tensor,
    turned: bool,
    step: int | None = None,
    first: Split | None = None,
    scaled: bool = False,
) -> Split | None:
    """How a projection's outputs (tokens, width) hold `target` (tokens, heads, d); None if they
    don't.

    Args:
        turned: as for `agree`.
        step: what offsets are multiples of; None for d.
        first: tried before all others.
        scaled: whether they may hold it but for one factor.
    """
    tokens, heads, d = target.shape
    width = outputs.shape[1]
    repeats = [
        r
        for r in _divisors(heads)
        if r == 1 or torch.equal(target, target[:, ::r].repeat_interleave(r, 1))
    ]
    tries = _splits(width, heads, d, math.gcd(step or d, d), repeats)
    if first is not None and width % first.groups == 0 and heads % first.repeat == 0:
        tries = (s for group in ([first], tries) for s in group)
    for split in tries:
        own = heads // split.repeat
        stretch, each = width // split.groups, own // split.groups * d * split.stride
        if own % split.groups or split.offset + each > stretch + split.stride - 1:
            continue
        cut = outputs.reshape(tokens, split.groups, stretch)
        cut = cut[:, :, split.offset : split.offset + each : split.stride]
        made = cut.reshape(tokens, own, d)
        if split.repeat > 1:
            made = made.repeat_interleave(split.repeat, 1)
        if scaled:
            made = made * (target.norm() / made.norm().clamp_min(1e-30))
        if _near(made, target) and agree(made, target, turned):
            return split
    return None


def _near(made: torch.Tensor, target: torch.Tensor) -> bool:
    """A cheap look at one number a token, before all are compared: as long, roughly."""
    a, b = float(made[0].norm()), float(target[0].norm())
    return abs(a - b) <= 0.1 * max(a, b, 1e-30)
