"""What two workers save of a scan's time, on a machine that may be busy with other things.

    python examples/cluster_speed.py --out examples/cluster_speed.json

One process and two workers run the same planned scan, one thread each, in turns. Wall time on a
busy machine is that of its other work too, so CPU seconds stand beside it: of one process, and of
the longest way with two workers, which is what this process does alone and the busier of the
workers. On an idle machine of two cores that is the time it takes. Workers are warm: Ray, their
imports and their models come before, and are timed by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import interp

BAR = 1.6
WORKERS = 2


def cpu(pids: list[int]) -> list[float]:
    """CPU seconds of processes so far, all their threads."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return [t.user + t.system for t in times]


def measured(run: Any, pids: list[int]) -> tuple[Any, float, list[float]]:
    """(what it gives, wall seconds, CPU seconds of each process) of one run."""
    before, start = cpu(pids), time.perf_counter()
    result = run()
    wall = time.perf_counter() - start
    return result, wall, [b - a for a, b in zip(before, cpu(pids), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    me = os.getpid()
    model = interp.load(options.model, device="cpu")

    def plan() -> Any:  # one for each run
        return interp.plan_scan(model, context=options.context, samples=options.samples)

    rounds: list[dict[str, Any]] = []
    with interp.cluster(workers=WORKERS, threads=1) as cluster:
        start = time.perf_counter()
        cluster.scan_heads(model, "sink", context=64, samples=8, progress=False)
        starting = time.perf_counter() - start
        assert cluster.pool is not None
        pids = [me, *(int(who.rpartition(":")[2]) for who in cluster.pool.seen)]
        assert len(pids) == 1 + WORKERS
        for _ in range(options.rounds):
            first, second = plan(), plan()
            one, wall_one, (cpu_one, *_) = measured(first.run, pids)
            two, wall_two, (mine, *theirs) = measured(partial(cluster.run, second), pids)
            rounds.append(
                dict(
                    equal=bool(one.frame.equals(two.frame) and one.evidence == two.evidence),
                    load=round(os.getloadavg()[0], 1),
                    one=dict(wall=round(wall_one, 1), cpu=round(cpu_one, 1)),
                    two=dict(
                        wall=round(wall_two, 1),
                        cpu_alone=round(mine, 1),
                        cpu_workers=[round(t, 1) for t in theirs],
                    ),
                    speedup_cpu=round(cpu_one / (mine + max(theirs)), 2),
                    speedup_wall=round(wall_one / wall_two, 2),
                )
            )
            print(json.dumps(rounds[-1]), flush=True)
    result = dict(
        what=" ".join(str(__doc__).split("\n\n")[2].split()),
        model=options.model,
        context=options.context,
        samples=options.samples,
        workers=WORKERS,
        threads=1,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        date=time.strftime("%Y-%m-%d"),
        versions={name: version(name) for name in ("torch", "transformers", "ray")},
        bar=BAR,
        starting_seconds=round(starting, 1),
        rounds=rounds,
        speedup_cpu=statistics.median(r["speedup_cpu"] for r in rounds),
        speedup_wall=statistics.median(r["speedup_wall"] for r in rounds),
    )
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
