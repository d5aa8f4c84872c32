"""Host time of one decode call: one query over a short cache, where the arithmetic is next to
nothing, against another checkout in one run.

    python kernels/benchmarks/host_time.py --against ../other --out \
        kernels/benchmarks/results/host_time.json

A round is a process a checkout, in turn first; a process' figure for a case is the fastest of its
blocks of calls, on one thread. Reported are the median over the rounds, the median of the rounds'
ratios, and where a median of as many ratios would fall in 95 of 100 runs (bootstrap). The row
"vendor call alone" is what torch's fused call takes without any of our code: no ratio of a plain
call can fall below its share. With --fused the same calls by the Triton backend, over a
cache that grows by a key a call, with nothing in place of its launches: what Python does before
a GPU has work. Operations of PyTorch that statistics take beside are in them, arithmetic included.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Keys in the cache.
LENGTHS = (16, 128)
BLOCKS, CALLS = 40, 50
#: Steps of a growing cache.
GROWING = 10


def cases(length: int) -> dict[str, Callable[[], object]]:
    """name → one call; public names alone, so that any checkout runs it."""
    import torch

    from interp_kernels import Mask, Request, Rule, Steer, attention

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, 1, 64, generator=generator)
    k, v = (torch.randn(1, 2, length, 64, generator=generator) for _ in range(2))
    mask = Mask(q_start=length - 1)
    statistics_wanted = Request(names=frozenset({"entropy", "max", "argmax"}))
    # ACT: the first key keeps half of its weight, the others share the rest
    rule = Rule(keep=torch.tensor([[1.0, 0.5]]), receive=torch.tensor([[1.0, 0.0]]))
    edit = Steer(spans=((0, 1, 1),), rule=rule)
    vendor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return {
        "plain": lambda: attention(q, k, v, mask=mask),
        "entropy, max, argmax": lambda: attention(q, k, v, mask=mask, request=statistics_wanted),
        "edit with a rule": lambda: attention(q, k, v, mask=mask, steer=edit),
        "edit and statistics": lambda: attention(
            q, k, v, mask=mask, steer=edit, request=statistics_wanted
        ),
        "vendor call alone": lambda: vendor(q, k, v, 0.0, False, attn_mask=None, scale=0.125),
    }


class Nothing:
    """Stands in for a kernel, whatever its grid and arguments."""

    def __getitem__(self, grid: object) -> Nothing:
        return self

    def __call__(self, *args: object, **constants: object) -> None:
        pass


def fused() -> dict[str, Callable[[], object]]:
    """name → `GROWING` calls by the Triton backend, whose launches do nothing from here on."""
    import torch

    from interp_kernels import Mask, Request, Rule, Steer, attention

    kernels = ("split_kernel", "combine_kernel", "decode_statistics_kernel")
    # where this and earlier checkouts launch from
    for name in ("decode_launch", "decode_statistics", "decode"):
        if importlib.util.find_spec(f"interp_kernels.fused.{name}"):
            module = importlib.import_module(f"interp_kernels.fused.{name}")
            for kernel in set(kernels) & set(vars(module)):
                setattr(module, kernel, Nothing())
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, 1, 64, generator=generator)
    steps = []
    for length in range(LENGTHS[-1] - GROWING + 1, LENGTHS[-1] + 1):
        k, v = (torch.randn(1, 2, length, 64, generator=generator) for _ in range(2))
        steps.append((k, v, Mask(q_start=length - 1)))
    rule = Rule(keep=torch.tensor([[1.0, 0.5]]), receive=torch.tensor([[1.0, 0.0]]))
    edit = Steer(spans=((0, 1, 1),), rule=rule)
    three = Request(names=frozenset({"entropy", "max", "argmax"}))

    def call(**asked: Any) -> Callable[[], object]:
        def run() -> None:
            for k, v, mask in steps:
                attention(q, k, v, mask=mask, backend="triton", **asked)

        return run

    return {
        "fused, plain": call(),
        "fused, gain": call(steer=Steer(gain=torch.ones(1, 8, 1))),
        "fused, edit with a rule": call(steer=edit),
        "fused, strongest 8 keys": call(request=Request(topk=8)),
        "fused, entropy, max, argmax": call(request=three),
        "fused, edit and statistics": call(steer=edit, request=three),
    }


def measure(quick: bool, only_fused: bool) -> dict[str, float]:
    """Microseconds a call of every case, in this process."""
    import torch

    found = {}
    blocks, calls = (2, 2) if quick else (BLOCKS, CALLS)
    with torch.no_grad():
        for length in () if only_fused else LENGTHS:
            for name, call in cases(length).items():
                found[f"{name} {length}"] = fastest(call, blocks, calls)
        if only_fused:
            for name, call in fused().items():
                times = fastest(call, blocks, max(calls // GROWING, 1))
                found[f"{name} {LENGTHS[-1]}"] = times / GROWING
    return found


def fastest(call: Callable[[], object], blocks: int, calls: int) -> float:
    """Microseconds a call in the fastest block of calls."""
    times = []
    for _ in range(blocks + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * min(times[1:])


def in_process(checkout: Path, quick: bool, only_fused: bool) -> dict[str, float]:
    """`measure` by the kernels of a checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout / "kernels")}
    environment["TRITON_INTERPRET"] = "1"  # kernels on the CPU; none of them runs
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    command += ["--quick"] * quick + ["--fused"] * only_fused
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def interval(ratios: Sequence[float], draws: int = 2000) -> list[float]:
    """2.5 and 97.5 % quantiles of the median of resampled ratios."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws)
    )
    return [round(medians[int(share * (draws - 1))], 3) for share in (0.025, 0.975)]


def commit(checkout: Path) -> str:
    """The commit, "+" if its kernels differ from it; "unknown" outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "kernels/interp_kernels")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def machine() -> str:
    """The processor's name, where the system tells it, and how many threads there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads"


def compare(against: Path | None, rounds: int, quick: bool, only_fused: bool) -> dict[str, Any]:
    """The result file's content."""
    checkouts = [ROOT] if against is None else [ROOT, against.resolve()]
    found: list[list[dict[str, float]]] = [[] for _ in checkouts]
    for turn in range(rounds):
        order = list(range(len(checkouts)))
        for i in order if turn % 2 else order[::-1]:
            found[i].append(in_process(checkouts[i], quick, only_fused))
    rows = []
    for name in found[0][0]:
        case, length = name.rsplit(" ", 1)
        row: dict[str, Any] = {"name": case, "keys": int(length)}
        row["us"] = round(statistics.median(one[name] for one in found[0]), 1)
        if against is not None:
            row["against_us"] = round(statistics.median(one[name] for one in found[1]), 1)
            ratios = [ours[name] / other[name] for ours, other in zip(*found, strict=True)]
            row |= {"ratio": round(statistics.median(ratios), 3), "interval": interval(ratios)}
        rows.append(row)
    head = {
        "what": "Microseconds of host time of one attention() call with one query over a short "
        "cache, q (1, 8, 1, 64), k and v (1, 2, keys, 64), float32 on a CPU: fastest block of "
        "calls of a process, median over rounds of interleaved processes; ratio to the other "
        "checkout's in the same round, with a 95 % interval.",
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(ROOT),
    }
    if against is not None:
        head["against"] = commit(against)
    return head | {"rounds": rounds, "torch": version("torch"), "rows": rows}


def dumps(result: dict[str, Any]) -> str:
    """JSON with a row a line."""
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the JSON there")
    parser.add_argument("--quick", action="store_true", help="a few calls: does it run at all?")
    parser.add_argument("--fused", action="store_true", help="the Triton backend, launches stubbed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.quick, arguments.fused)))
        return
    text = dumps(compare(arguments.against, arguments.rounds, arguments.quick, arguments.fused))
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
