"""What sparse layouts of attention save on a CPU: the keys that are listed, beside all of them.

    python kernels/benchmarks/layouts.py --out kernels/benchmarks/profiles/layouts.json

One layer of SmolLM2-135M's shape (9 query and 3 kv heads of 64 dimensions, float32, random data),
a prompt and one step of generation on top of it: plain attention, a tree search for 512 keys (HiP)
by blocks of 32 and of 64 queries, and one block of three for each kv head (S2), each by the keys
that it lists and, where that fits, by a mask over all of them. All in turns; the median of the
rounds as a ratio to plain attention of the same round, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import about, written

from interp.edits import HierarchicalTopk, Sharded
from interp_hooks.call import AttentionCall, Site
from interp_kernels import Mask, Request, attention

HEADS, KV_HEADS, DIM = 9, 3, 64
EDITS = {
    "HiP, 32 queries": HierarchicalTopk(512),
    "HiP, 64 queries": HierarchicalTopk(512, block_q=64, block_k=4),
    "S2": Sharded(stride=KV_HEADS),
}
#: queries · keys of which a mask is made
MASKED = 8192 * 8192


def call_of(keys: int, queries: int) -> AttentionCall:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, n, DIM, generator=draw)
        for heads, n in ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    )
    site = Site("", 0, "self", "", HEADS, KV_HEADS, DIM)
    return AttentionCall(site, q, k, v, Mask(q_start=keys - queries), DIM**-0.5)


def attend(call: AttentionCall) -> None:
    assert call.query is not None and call.key is not None
    attention(call.query, call.key, call.value, **call.settings, request=Request(lse=False))


def ways(call: AttentionCall) -> dict[str, Callable[[], Any]]:
    """By name, what is timed; plain attention first."""
    made: dict[str, Callable[[], Any]] = {"plain": lambda: attend(call)}
    for name, edit in EDITS.items():
        made[name] = lambda edit=edit: edit.alone(call)
        if call.n_queries * call.n_keys <= MASKED:
            made[f"{name}, by a mask"] = lambda edit=edit: attend(edit.before(call))
    return made


def measured(keys: int, queries: int, runs: int) -> dict[str, Any]:
    call = call_of(keys, queries)
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for round_ in range(runs + 1):  # the first is thrown away
            for name, way in ways(call).items():
                started = time.perf_counter()
                way()
                if round_:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
    ratios = {}
    for name, each in seconds.items():
        ratio = [a / b for a, b in zip(each, seconds["plain"], strict=True)]
        ratios[name] = [round(f(ratio), 3) for f in (statistics.median, min, max)]
    return dict(
        keys=keys,
        queries=queries,
        milliseconds=round(statistics.median(seconds["plain"]) * 1e3, 2),
        ratios=ratios,
    )


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    shapes = [(n, n) for n in args.lengths] + [(n, 1) for n in args.lengths]
    rows = [measured(n, m, args.runs) for n, m in shapes]
    written(dict(what="layouts", runs=args.runs, load_before=load, rows=rows, **about()), args.out)


if __name__ == "__main__":
    main()
