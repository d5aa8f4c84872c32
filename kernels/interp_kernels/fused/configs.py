"""How each kernel is cut into tiles: a static table by GPU family, head dimension and work, and
opt-in autotuning.

The families are compute capabilities with shared memory and tensor cores of their own: 80 (A100),
89 (Ada, and 8.6), 90 (Hopper), 100 (Blackwell with tcgen05), 120 (Blackwell without). Every row is
the one with fewest instructions a logit among those that compile without a spill in a hot loop, for
all flags of its column but arg-max beside other statistics on Hopper, which touches a few
(`kernels/benchmarks/compiled.py` holds them to it); no GPU has timed them.

`INTERP_AUTOTUNE=1` times every candidate once a process and shape and keeps the fastest; without it
nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .primitives import INTERPRETED


@dataclass(frozen=True)
class Config:
    """rows: queries a program; cols: keys a tile; then what Triton is told. specialised: by the
    kernel whose warps are (`specialised.py`)."""

    rows: int
    cols: int
    warps: int
    stages: int
    specialised: bool = False


#: Head dimensions that have a row; those between take the next.
DIMS = (64, 96, 128, 192, 256, 512)
#: What a tile's loop does beside the softmax: nothing; a window, a bias, a soft-cap, …; statistics.
PLAIN, DRESSED, STATISTICS = range(3)

#: family → head dimension → forward tiles (plain, dressed, with statistics) of 16-bit tensors.
_FORWARD: dict[int, dict[int, tuple[Config, Config, Config]]] = {
    80: {
        64: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
        96: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
        128: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(128, 32, 8, 3)),
        192: (Config(128, 32, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 4, 2)),
        256: (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 4, 2)),
        512: (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 2)),
    },
    89: {
        64: (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 64, 8, 2)),
        96: (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        192: (Config(128, 32, 8, 3), Config(128, 32, 8, 2), Config(64, 32, 4, 2)),
        256: (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1)),
        512: (Config(16, 32, 4, 1), Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    },
    90: {
        64: (Config(128, 128, 8, 3), Config(128, 128, 8, 3), Config(128, 64, 8, 3)),
        96: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
        128: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
        192: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
        256: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 8, 3)),
        512: (Config(64, 16, 8, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
    },
    100: {
        64: (Config(128, 128, 8, 3), Config(128, 128, 8, 3), Config(128, 32, 8, 3)),
        96: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
        128: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
        192: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
        256: (Config(128, 32, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 3)),
        512: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    },
    120: {
        64: (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        96: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
        192: (Config(32, 32, 4, 2), Config(128, 16, 8, 2), Config(128, 16, 8, 2)),
        256: (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
        512: (Config(16, 32, 4, 1), Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    },
}
#: (family, head dimension, work, also) where that wants narrower tiles of 16-bit tensors than the
#: work alone: "hidden" keys, "biased" by query and key.
_NARROWER = {
    (80, 128, STATISTICS, "biased"): Config(128, 16, 8, 3),
    (90, 64, STATISTICS, "biased"): Config(128, 32, 8, 3),
    (90, 128, STATISTICS, "biased"): Config(128, 32, 8, 3),
    (90, 256, STATISTICS, "biased"): Config(128, 16, 8, 2),
    (120, 128, PLAIN, "hidden"): Config(64, 64, 8, 2),
}
#: `_FORWARD` of float32: three tf32 products and twice the bytes. Heads of more than 192 dimensions
#: spill whatever their tiles.
_FORWARD_32: dict[int, dict[int, tuple[Config, Config, Config]]] = {
    80: {
        64: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        96: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        128: (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        192: (Config(16, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 2)),
    },
    89: {
        64: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        96: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        128: (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        192: (Config(16, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 2)),
    },
    90: {
        64: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        96: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        128: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        192: (Config(16, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 2)),
    },
    100: {
        64: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        96: (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        128: (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        192: (Config(16, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 2)),
    },
    120: {
        64: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        96: (Config(64, 16, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        128: (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        192: (Config(16, 16, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 2)),
    },
}
_INTERPRETED = Config(32, 32, 1, 1)


@lru_cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; Hopper's where there is none."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (9, 0)


def family(device: torch.device) -> int:
    """Which rows of the tables a device takes; what is newer than all of them, those that ask for
    least."""
    major, minor = capability(device.index)
    if major == 8:
        return 80 if minor in (0, 7) else 89
    return {9: 90, 10: 100}.get(major, 120)


@lru_cache
def processors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; a Hopper's 132 where there is none."""
    return (
        torch.cuda.get_device_properties(index).multi_processor_count
        if torch.cuda.is_available()
        else 132
    )


def bucket(dim: int) -> int:
    """The row of a head dimension."""
    return next(d for d in DIMS if dim <= d)


def why_not(dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why no tiles serve such heads on this device, "" if some do."""
    if INTERPRETED or dtype != torch.float32 or bucket(dim) in _FORWARD_32[family(device)]:
        return ""
    return f"float32 heads of dimension {dim} do not fit the registers of this GPU"


def forward(
    dim: int, dtype: torch.dtype, work: int, device: torch.device, also: str = ""
) -> Config:
    """Tiles of the forward kernel for the larger of d and d_v; work: `PLAIN`, `DRESSED` or
    `STATISTICS`; also: "hidden" or "biased"."""
    if INTERPRETED:
        return _INTERPRETED
    own, row = family(device), bucket(dim)
    if dtype == torch.float32:
        return _FORWARD_32[own][row][work]
    return _NARROWER.get((own, row, work, also)) or _FORWARD[own][row][work]


def row_pass(
    dim: int, dtype: torch.dtype, device: torch.device, blocks: bool = True, biased: bool = False
) -> Config:
    """Tiles of the pass of queries and keys alone; with maxima of blocks a tile has at least
    `row_pass.BLOCK` keys; biased: by query and key."""
    if INTERPRETED:
        return _INTERPRETED
    small = family(device) in (89, 120)  # shared memory
    if dtype == torch.float32:
        tight = dim > 128 and small
        if blocks:
            return Config(32 if dim <= 64 else 16, 32, 4, 1 if tight else 2)
        rows = 32 if dim > 64 and family(device) == 100 else 64
        return Config(16 if tight else rows, 16, 4, 2)
    if family(device) == 100 and dim <= 256:  # wider tiles spill
        return Config(128, 32, 8, 3 if dim <= 128 else 2)
    if dim <= 128:
        return Config(128, 64, 8, 2 if small or biased else 3)
    if dim <= 256:
        return Config(64, 32, 4, 2) if small else Config(128, 64, 8, 2)
    return Config(32, 32, 4, 1) if small else Config(64, 32, 4, 2)


_FASTEST: dict[Hashable, Config] = {}


def tuned(
    key: Hashable, default: Config, candidates: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """The default, or with INTERP_AUTOTUNE=1 the fastest of the candidates that compile, timed once
    a key."""
    if (
        INTERPRETED
        or os.environ.get("INTERP_AUTOTUNE") != "1"
        or torch.cuda.is_current_stream_capturing()
    ):
        return default
    if key not in _FASTEST:
        from triton.testing import do_bench

        from .capable import does_not_run

        times: dict[Config, float] = {}
        for config in {default, *candidates}:
            try:
                times[config] = do_bench(
                    lambda config=config: run(config), warmup=10, rep=50, return_mode="median"
                )
            except Exception as error:
                if not does_not_run(error):
                    raise
                continue  # this one does not fit; the others may
        if not times:
            return default  # whose error says why
        _FASTEST[key] = min(times, key=times.__getitem__)
    return _FASTEST[key]


#: What autotuning tries beside `CANDIDATES` where `specialised.serves` a call on a Hopper. No row
#: of the table is of this kernel before a device has shown that it is the faster one.
SPECIALISED = (Config(128, 128, 4, 2, True), Config(128, 64, 4, 3, True))
#: What autotuning tries for the forward kernel.
CANDIDATES = (
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 3),
    Config(128, 64, 4, 3),
    Config(64, 64, 4, 3),
    Config(64, 128, 4, 2),
    Config(64, 32, 4, 2),
)
