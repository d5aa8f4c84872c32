"""How each kernel is cut into tiles: a static table by architecture, head dimension and work, and
opt-in autotuning.

`INTERP_AUTOTUNE=1` times every candidate once a process and shape and keeps the fastest; without it
nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .primitives import INTERPRETED, padded_dim


@dataclass(frozen=True)
class Config:
    """rows: queries a program; cols: keys a tile; then what Triton is told."""

    rows: int
    cols: int
    warps: int
    stages: int


#: (architecture, padded head dimension, more in the loop than the softmax) → forward tiles;
#: tests/kernels/test_aot.py looks at what they compile to.
_FORWARD: dict[tuple[int, int, bool], Config] = {
    (9, 16, False): Config(128, 128, 4, 3),
    (9, 32, False): Config(128, 128, 4, 3),
    (9, 64, False): Config(128, 128, 8, 3),
    (9, 128, False): Config(128, 128, 8, 2),
    (9, 256, False): Config(128, 64, 8, 2),
    (9, 16, True): Config(128, 64, 8, 3),
    (9, 32, True): Config(128, 64, 8, 3),
    (9, 64, True): Config(128, 64, 8, 3),
    (9, 128, True): Config(128, 64, 8, 3),
    (9, 256, True): Config(64, 32, 8, 3),
}
#: Elsewhere: small enough for 99 KB of shared memory.
_SMALL = {
    16: Config(64, 64, 4, 2),
    32: Config(64, 64, 4, 2),
    64: Config(64, 64, 4, 2),
    128: Config(64, 32, 4, 2),
}
_INTERPRETED = Config(32, 32, 1, 1)


@lru_cache
def architecture(index: int | None) -> int:
    """Major compute capability of a CUDA device; 9 (Hopper) where there is none."""
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 9


@lru_cache
def processors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; a Hopper's 132 where there is none."""
    return (
        torch.cuda.get_device_properties(index).multi_processor_count
        if torch.cuda.is_available()
        else 132
    )


def forward(dim: int, dtype: torch.dtype, busy: bool, device: torch.device) -> Config:
    """Tiles of the forward kernel for the larger of d and d_v; busy: statistics, a window or σ want
    registers too."""
    if INTERPRETED:
        return _INTERPRETED
    dim = padded_dim(dim)
    if dtype == torch.float32:  # three tf32 products and twice the bytes
        if dim <= 128:
            return Config(16, 32, 4, 2) if busy else Config(64, 16, 4, 2)
        return Config(16, 16, 4, 2)
    arch = architecture(device.index)
    if arch == 9 or arch == 10:
        return _FORWARD[9, dim, busy]
    return _SMALL.get(dim, Config(32, 32, 4, 1))


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
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        times: dict[Config, float] = {}
        for config in {default, *candidates}:
            try:
                times[config] = do_bench(
                    lambda config=config: run(config), warmup=10, rep=50, return_mode="median"
                )
            except OutOfResources:  # this one does not fit; the others may
                continue
        _FASTEST[key] = min(times, key=times.__getitem__)
    return _FASTEST[key]


#: What autotuning tries for the forward kernel.
CANDIDATES = (
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 3),
    Config(128, 64, 4, 3),
    Config(64, 64, 4, 3),
    Config(64, 128, 4, 2),
    Config(64, 32, 4, 2),
)
