"""What the kernels share: constants, dots that are right under the interpreter, masks, and launch
helpers.

Inside the kernels logits are in base 2 (× log₂ e): exp2 is what the hardware has. A hidden key has
logit `HIDDEN`, a running maximum starts at `FLOOR` ≫ HIDDEN, so that a row that sees nothing gets
exp2(HIDDEN − FLOOR) = 0 everywhere and no infinity or NaN arises anywhere. `TRITON_INTERPRET=1`
must be set before this module is imported.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import steer
from ..masking import bias_visible

LOG2E = math.log2(math.e)
HIDDEN = tl.constexpr(-1e30)
FLOOR = tl.constexpr(-1e29)
NOTHING = tl.constexpr(steer.NOTHING)

#: True in a process that runs kernels through Triton's interpreter, on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: What the kernels read: anything is accumulated in float32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Larger head dimensions would not fit a tile.
MAX_DIM = 512
#: A rule's groups of keys: each is a state, and a column of a program's masses.
MAX_GROUPS = 8


@triton.jit
def dot(a, b, acc, INTERP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter multiplies bf16 bit patterns as integers, so it gets
    float32."""
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile(  # noqa: PLR0913
    start, at, stride, inside,
    FROM: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, CUT: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """The dimensions FROM … FROM + SIZE of the vectors at start + at, 0 beyond the D there are:
    (vectors, SIZE) for at (vectors, 1), or with ACROSS (SIZE, vectors) for at (1, vectors). CUT:
    only those of `inside` (vectors,) are there. What needs no mask is loaded without."""
    dims = tl.arange(0, SIZE)
    start += FROM * stride
    if ACROSS:
        to = at + dims[:, None] * stride
        real = (dims < D - FROM)[:, None]
        there = inside[None, :]
    else:
        to = at + dims[None, :] * stride
        real = (dims < D - FROM)[None, :]
        there = inside[:, None]
    if CUT and D < FROM + SIZE:
        value = tl.load(start + to, mask=there & real, other=0.0)
    elif CUT:
        value = tl.load(start + to, mask=there, other=0.0)
    elif D < FROM + SIZE:
        value = tl.load(start + to, mask=real, other=0.0)
    else:
        value = tl.load(start + to)
    return value


@triton.jit
def soft_cap(s, cap):
    """cap·tanh(s / cap), s and cap in base-2 units. tanh from exp2: it saturates at ±1 and never
    overflows to NaN."""
    # tanh(x) = 1 − 2 / (1 + e^{2x}); with s = x·cap, e^{2x} = 2^{2·log2(e)·s/cap}
    e = tl.exp2(
        tl.minimum(s * (2.885390081777927 / cap), 126.0)
    )  # a division of scalars, outside the loops
    return cap * (1.0 - 2.0 / (1.0 + e))


@triton.jit
def seen(  # noqa: PLR0913
    rows, cols, off, lk, window, keep0, keep1,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Geometry: row i stands at column i + off; bool of the broadcast shape of rows and cols. KEPT:
    the columns keep0 … keep1 − 1 stay in sight beyond the window."""
    ahead = rows + off - cols  # how far the query is past the key
    ok = (cols < lk) & (ahead == ahead)
    if CAUSAL:
        ok = ok & (ahead >= 0)
    if WINDOW:
        near = (ahead < window) & (ahead > -window)
        if KEPT:
            near = near | ((cols >= keep0) & (cols < keep1))
        ok = ok & near
    return ok


@triton.jit
def reach(first, last, lk, window, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(lo, full0, full1, hi) of rows that stand at the columns first … last, kept keys aside: tiles
    of lo … hi are seen by some of them, those of full0 … full1 by all; all but hi are multiples of
    BN."""
    lo = 0
    hi = lk
    if CAUSAL:
        hi = tl.minimum(hi, last + 1)
    if WINDOW:
        lo = tl.maximum(lo, first - window + 1)
        if not CAUSAL:
            hi = tl.minimum(hi, last + window)
    full1 = hi
    if CAUSAL:
        full1 = tl.minimum(full1, first + 1)
    elif WINDOW:
        full1 = tl.minimum(full1, first + window)
    full0 = lo
    if WINDOW:
        full0 = tl.maximum(lo, last - window + 1)
    lo = lo // BN * BN
    full1 = tl.maximum(full1, 0) // BN * BN
    if WINDOW:
        full0 = tl.cdiv(tl.maximum(full0, lo), BN) * BN
    else:
        full0 = lo
    return lo, full0, full1, hi


def precision(dtype: torch.dtype) -> str:
    """How a dot of this dtype is done: float32 by three tf32 products (error near 1e-6), which
    tensor cores can."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def padded_dim(d: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16 (the smallest a dot
    takes)."""
    return max(16, triton.next_power_of_2(d))


def parts(d: int) -> tuple[int, int]:
    """A head dimension as one tile (`padded_dim`, 0), or above 64 as two where their sum is less:
    96 = 64 + 32, 192 = 128 + 64, 80 = 64 + 16. A tile is as wide as a power of two."""
    whole = padded_dim(d)
    rest = padded_dim(d - whole // 2)
    return (whole // 2, rest) if d > 64 and rest < whole // 2 else (whole, 0)


def flags(value: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, which kernels can load; not a copy."""
    return None if value is None else value.view(torch.uint8)


def hides(bias: Tensor | None) -> float:
    """A bias up to this hides its key, as `masking.bias_visible`."""
    floor = float(FLOOR.value)
    if bias is None or not bias.is_floating_point():
        return floor
    return max(torch.finfo(bias.dtype).min / 2, floor)


def dense_kind(dense: Tensor | None) -> int:
    """What a dense mask is to the kernels: 0 none, 1 flags, 2 a bias."""
    return 0 if dense is None else 1 if dense.dtype == torch.bool else 2


def loadable(dense: Tensor | None) -> Tensor | None:
    """A dense mask as kernels load it: flags as uint8, float64 as float32; else no copy."""
    if dense is None or dense.dtype == torch.bool:
        return flags(dense)
    if dense.dtype != torch.float64:
        return dense
    return dense.masked_fill(~bias_visible(dense), -torch.inf).float()


def strides(value: Tensor | None, n: int) -> tuple[int, ...]:
    """The n strides of a tensor, 0 for dimensions of size 1 (so that they broadcast) and for an
    absent tensor."""
    if value is None:
        return (0,) * n
    return tuple(
        0 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )


#: Types of an operator's arguments, as annotations say them and as its schema does.
_KINDS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[int]": "SymInt[]",
    "Sequence[int]": "SymInt[]",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
}


def schema(arguments: type, returns: str) -> str:
    """The schema of an operator whose arguments are the fields of a dataclass. An operator's
    boundary is flat, numbers and tensors alone; behind it they are one object again."""
    given = (f"{_KINDS[str(one.type)]} {one.name}" for one in fields(arguments))
    return f"({', '.join(given)}) -> {returns}"


def device_of(value: Tensor) -> AbstractContextManager[object]:
    """Context in which a kernel launches on the tensor's device."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
