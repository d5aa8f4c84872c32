"""What edits and statistics cost inside vLLM: times of decode steps as ratios to a step without.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
    VLLM_CPU_KVCACHE_SPACE=1 python kernels/benchmarks/serving_overhead.py MODEL OUT.json

In an environment with vLLM (docs/how-to/serve-an-edit.md). The engine runs in this process, in its
default compiled mode. All conditions take turns, step for step of the same requests, round after
round; a round gives a ratio of medians, and the table has the median over rounds with the lowest
and the highest. "off" is the engine with its own attention put back, "idle" the one that is tapped
and serves requests that ask nothing. Times are of the process (CPU), which other work on the
machine disturbs less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

#: (requests, tokens of each prompt)
LOADS = ((4, 800), (8, 14))
STEPS = 12


def conditions() -> dict[str, dict[str, Any] | None]:
    """What the requests of each condition ask."""
    from interp import edits
    from interp_vllm import asking

    gains = {f"L{layer}H{head}": 0.5 for layer in range(30) for head in range(9)}
    every = {
        "names": ["entropy", "first", "off_sink"],
        "groups": {"a": "1:9", "b": "9:14"},
        "topk": 5,
    }
    return {
        "off": None,
        "idle": None,
        "gains of all heads": asking([edits.ScaleHeads(gains)]),
        "ZeroTuning in all layers": asking([edits.ZeroTuning(1.5)]),
        "entropy": asking([], ["entropy"]),
        "all statistics": asking([], every),
    }


def steps(llm: Any, prompts: list[list[int]], extra: dict[str, Any] | None) -> float:
    """Median CPU seconds of a decode step."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True, extra_args=extra)
    engine, times = llm.llm_engine, []
    for prompt in prompts:
        engine.add_request(str(next(NUMBERS)), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        began = time.process_time()
        engine.step()
        times.append(time.process_time() - began)
    return statistics.median(times[-(STEPS - 2) :])


NUMBERS = iter(range(1_000_000))


def switch(llm: Any) -> Callable[[bool], None]:
    """Puts the engine's own attention and steps back, and ours again."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    context = worker.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in context.values()]
    ours = [impl.forward for impl in impls]
    own = [forward.__wrapped__ for forward in ours]
    runner = worker.model_runner
    stepped = runner.execute_model

    def put(tapped: bool) -> None:
        for impl, mine, theirs in zip(impls, ours, own, strict=True):
            impl.forward = mine if tapped else theirs
        runner.execute_model = stepped if tapped else stepped.__wrapped__

    return put


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    import torch
    import vllm

    llm = vllm.LLM(
        os.path.expanduser(given.model),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        enforce_eager=given.eager,
        additional_config={"interp": True},
    )
    put, rows = switch(llm), []
    generator = torch.Generator().manual_seed(0)
    for requests, length in LOADS:
        prompts = torch.randint(100, 20000, (requests, length), generator=generator).tolist()
        ratios: dict[str, list[float]] = {}
        plain: list[float] = []
        for number in range(given.rounds + 1):
            times = {}
            for name, extra in conditions().items():
                put(name != "off")
                times[name] = steps(llm, prompts, extra)
            if number:  # the first fills the prefix cache
                plain.append(times["off"])
                for name, seconds in times.items():
                    ratios.setdefault(name, []).append(seconds / times["off"])
        put(True)
        for name, values in ratios.items():
            row = dict(
                requests=requests,
                prompt=length,
                condition=name,
                ratio=round(statistics.median(values), 3),
                low=round(min(values), 3),
                high=round(max(values), 3),
                milliseconds_off=round(1000 * statistics.median(plain), 2),
            )
            rows.append(row)
            print(row, flush=True)
    record = dict(
        what="CPU time of a decode step inside vLLM, as a ratio to one without interp_vllm",
        date=str(date.today()),
        machine=f"{platform.processor() or platform.machine()}, 1 thread",
        versions=dict(vllm=vllm.__version__, torch=torch.__version__),
        mode="eager" if given.eager else "compiled",
        rounds=given.rounds,
        model=Path(given.model).name,
        rows=rows,
    )
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
